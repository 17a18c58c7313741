"""Answering three questions about a picture: the project's path against a straightforward one.

python benchmarks/lisat_eval.py            about a minute of processor time; --tiny for seconds
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import BenchmarkConfig, Report, measured, peak_memory  # noqa: E402
from utils.config import parse_config  # noqa: E402

OURS, PLAIN = "ours", "straightforward"
TOLERANCE, TARGET = 1e-4, 5.0
MAX_NEW_TOKENS = 16


def run(config: BenchmarkConfig) -> Report:
    """Measure memory, compare the answers, then time; lines for the screen and whether all was equal."""
    import torch

    from benchmarks import baseline, workload

    torch.set_num_threads(1)
    sizes = workload.tiny() if config.tiny else workload.mid_size()
    work = workload.build(sizes, config.images, config.questions, config.seed)
    ids, real = work.padded(work.prompts)

    def ours() -> list:
        return work.model.evaluate(
            work.images_clip,
            work.images,
            ids,
            work.shapes,
            MAX_NEW_TOKENS,
            offset=work.offset,
            attention_masks=real,
        )

    def plain() -> list:
        with baseline.eager_attention(work.model):
            return [
                baseline.answer(
                    work.model, prompt, work.images_clip[b], work.images[b], work.shapes[b], MAX_NEW_TOKENS
                )
                for b, prompts in enumerate(work.prompts)
                for prompt in prompts
            ]

    paths = {OURS: ours, PLAIN: plain}
    memory = {name: peak_memory(path) for name, path in paths.items()}
    answers, expected = ours(), plain()
    same_ids = all(a.new_ids == new for a, (new, _) in zip(answers, expected, strict=True))
    same_shapes = all(a.mask_logits.shape == x.shape for a, (_, x) in zip(answers, expected, strict=True))
    drawn = all(len(x) == 1 for _, x in expected)  # every answer holds one [SEG]
    equal, lines = same_ids and same_shapes and drawn, []
    lines.append(f"answers {[new for new, _ in expected]}: ids {'equal' if same_ids else 'DIFFER'}")
    if same_shapes and drawn:
        worst = max(float((a.mask_logits - x).abs().max()) for a, (_, x) in zip(answers, expected))
        spread = max(float((x - expected[0][1]).abs().max()) for _, x in expected[: config.questions])
        lines.append(f"mask logits: largest difference {worst:.1e}; between questions {spread:.1e}")
        equal = equal and worst <= TOLERANCE
    else:
        lines.append("mask logits: shapes DIFFER")
    lines += measured(paths, config.repeats, memory)
    return Report([*lines, f"equal within {TOLERANCE:g}: {equal}; aimed at {TARGET:g}x"], equal)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and print its report; exit code 1 if the two paths' results differ."""
    report = run(parse_config(BenchmarkConfig, argv, prog="lisat_eval.py"))
    print("\n".join(report.lines))
    sys.exit(0 if report.equal else 1)


if __name__ == "__main__":
    main()
