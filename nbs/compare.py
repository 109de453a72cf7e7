"""The end of `make demo`: the comparison table and its figure, from the runs below a folder."""
import sys
from pathlib import Path

from deltaf1_al.analysis import compare, computed_once, format_comparison, load_runs
from deltaf1_al.figures import learning_curves, save_figure, style

folder = Path(sys.argv[1])
runs = load_runs(folder)
with style("screen"):
    figure = save_figure(learning_curves(runs), folder / "learning_curves.png")
print(format_comparison(compare(runs)))
once = computed_once(runs).sum()
print(
    f"Alone these runs are {once['rounds']:.0f} rounds and {once['total_flops'] / 1e12:.1f} TFLOP; what they share was computed once, "
    f"so that {once['rounds_computed']:.0f} rounds and {once['total_flops_computed'] / 1e12:.1f} TFLOP were needed."
)
print(f"Figure: {figure}")
