"""The package stays small enough to be read: a budget for each file, one for the whole. -s shows the counts."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "foretell"
FILE_LINES, TOTAL_LINES = 500, 27953


def line_counts(package: Path) -> dict[str, int]:
    return {str(p.relative_to(package)): len(p.read_text().splitlines()) for p in sorted(package.rglob("*.py"))}


def over_budget(counts: dict[str, int]) -> list[str]:
    """What is too long, in words."""
    long = [
        f"{name}: {lines} lines, wanted {FILE_LINES} at most" for name, lines in counts.items() if lines > FILE_LINES
    ]
    total = sum(counts.values())
    return long + ([f"all files: {total} lines, wanted {TOTAL_LINES} at most"] if total > TOTAL_LINES else [])


def test_every_file_is_within_its_budget():
    counts = line_counts(PACKAGE)
    for name, lines in counts.items():
        print(f"{lines:5} {name}")
    print(f"{sum(counts.values()):5} in all")
    assert len(counts) > 10
    assert over_budget(counts) == []


def test_the_budget_can_be_exceeded(tmp_path):
    (tmp_path / "long.py").write_text("x = 1\n" * (FILE_LINES + 1))
    assert over_budget(line_counts(tmp_path)) == [f"long.py: {FILE_LINES + 1} lines, wanted {FILE_LINES} at most"]
    assert over_budget({str(n): FILE_LINES for n in range(TOTAL_LINES // FILE_LINES + 1)})[0].startswith("all files")
