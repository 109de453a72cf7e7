__version__ = "0.1.0"

import os

# Threads that wait by spinning starve each other as soon as anything else runs: on two busy cores a training
# step took five times as long. OpenMP reads this once, when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Threads that sleep at once are woken a thousand times a step, which costs a third of it. Some microseconds of
# spinning cover the gap between two operations; where two runs share the same cores they cost a fifth.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
