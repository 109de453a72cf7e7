"""The end of `make demo`: the comparison table, the Pareto front and their figures, from the runs below a folder."""
import sys
from pathlib import Path

from deltaf1_al.analysis import compare, computed_once, format_comparison, format_pareto, load_runs, pareto
from deltaf1_al.figures import learning_curves, pareto_front, save_figure, style

folder = Path(sys.argv[1])
runs = load_runs(folder)
table = compare(runs)
front = pareto(table)
with style("screen"):
    figures = save_figure(learning_curves(runs), folder / "learning_curves.png"), save_figure(pareto_front(front), folder / "pareto.png")
print(format_comparison(table), format_pareto(front), sep="\n\n")
once = computed_once(runs).sum()
print(
    f"Alone these runs are {once['rounds']:.0f} rounds and {once['total_flops'] / 1e12:.1f} TFLOP; what they share was computed once, "
    f"so that {once['rounds_computed']:.0f} rounds and {once['total_flops_computed'] / 1e12:.1f} TFLOP were needed."
)
print(f"Figures: {figures[0]}, {figures[1]}")
