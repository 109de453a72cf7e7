"""The end of `make demo`: the comparison table, the Pareto front and their figures, from the runs below a folder."""
import sys
from argparse import ArgumentParser
from pathlib import Path

from deltaf1_al.analysis import compare, computed_once, format_comparison, format_pareto, load_runs, pareto
from deltaf1_al.config import UserError
from deltaf1_al.figures import learning_curves, pareto_front, save_figure, style

parser = ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path, help="holds the runs; the figures go there")
parser.add_argument("--label-price", type=float, default=0.0, help="money for a label; with a price, the Pareto front is drawn against money instead of FLOPs")
parser.add_argument("--pflop-price", type=float, default=0.0, help="money for a PFLOP, in the same currency")
given = parser.parse_args()
try:
    runs = load_runs(given.folder)
    table = compare(runs)
    front = pareto(table, label_price=given.label_price, pflop_price=given.pflop_price)
except UserError as e:
    sys.exit(str(e))
with style("screen"):
    figures = save_figure(learning_curves(runs), given.folder / "learning_curves.png"), save_figure(pareto_front(front), given.folder / "pareto.png")
print(format_comparison(table), format_pareto(front), sep="\n\n")
once = computed_once(runs).sum()
print(
    f"Alone these runs are {once['rounds']:.0f} rounds and {once['total_flops'] / 1e12:.1f} TFLOP; what they share was computed once, "
    f"so that {once['rounds_computed']:.0f} rounds and {once['total_flops_computed'] / 1e12:.1f} TFLOP were needed."
)
print(f"Figures: {figures[0]}, {figures[1]}")
