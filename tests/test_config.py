"""Settings: what is right is read from flags, YAML and dicts alike; what is wrong is told, all of it, in one error."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from foretell.config import ConfigError, check, coerce, from_dict, parse, parse_settings, to_dict, to_yaml


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Inner:
    """Part of another dataclass."""

    width: int = 1


@dataclass(kw_only=True)
class Module:
    """What the module looks like."""

    depth: int = field(default=2, metadata={"help": "Depths of the module."})
    kind: Literal["ce", "kl", "none"] = "ce"
    scale: float = 0.1
    shared: bool = False
    tied: bool | None = None
    weights: list[float] | None = None
    names: list[str] = field(default_factory=list)
    pair: tuple[int, float] = (1, 0.5)
    note: str | None = None
    size: int | None = None
    folder: Path | None = None
    colour: Colour = Colour.RED
    extra: dict[str, int] = field(default_factory=dict)
    draft: int | Literal["auto"] = "auto"
    inner: Inner = field(default_factory=Inner)

    def problems(self) -> list[str]:
        return [] if self.depth >= 1 else [f"depth: got {self.depth}, wanted 1 or more"]


@dataclass
class Run:
    """What to run."""

    model: str = field(metadata={"positional": True})
    steps: int = 10
    report: str | list[str] | None = "none"

    def problems(self) -> list[str]:
        return [] if self.steps > 0 else [f"steps: got {self.steps}, wanted more than 0"]


@dataclass
class Checked:
    """Refuses bad values wherever it is made."""

    rate: float = 1.0

    def problems(self) -> list[str]:
        return [] if self.rate > 0 else [f"rate: got {self.rate}, wanted more than 0"]

    def __post_init__(self):
        check(self)


def problems_of(*classes, argv) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_settings(classes, argv)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--depth", "3"], "depth", 3),
        (["--depth=3"], "depth", 3),
        (["--depth", "-3", "--depth", "3"], "depth", 3),
        (["--scale", "-1e-3"], "scale", -0.001),
        (["--scale", "2"], "scale", 2.0),
        (["--shared"], "shared", True),
        (["--shared", "--no-shared"], "shared", False),
        (["--no_shared"], "shared", False),
        (["--shared", "True"], "shared", True),
        (["--shared=false"], "shared", False),
        (["--tied"], "tied", True),
        (["--no-tied"], "tied", False),
        (["--tied=null"], "tied", None),
        (["--kind", "none"], "kind", "none"),
        (["--weights", "1", "0.5", "-2"], "weights", [1.0, 0.5, -2.0]),
        (["--weights", "1"], "weights", [1.0]),
        (["--weights", "[1, 2]"], "weights", [1.0, 2.0]),
        (["--weights", "null"], "weights", None),
        (["--names", "a", "b", "--shared"], "names", ["a", "b"]),
        (["--names", "3"], "names", ["3"]),
        (["--pair", "2", "3"], "pair", (2, 3.0)),
        (["--note", "12"], "note", "12"),
        (["--note", "none"], "note", "none"),
        (["--note", "null"], "note", None),
        (["--note=--x"], "note", "--x"),
        (["--note", ""], "note", ""),
        (["--size", "none"], "size", None),
        (["--size", "7"], "size", 7),
        (["--folder", "a/b"], "folder", Path("a/b")),
        (["--colour", "blue"], "colour", Colour.BLUE),
        (["--extra", "{a: 1}"], "extra", {"a": 1}),
        (["--draft", "auto"], "draft", "auto"),
        (["--draft", "4"], "draft", 4),
        (["--inner", "{width: 5}"], "inner", Inner(5)),
    ],
)
def test_a_flag_is_read(argv, name, value):
    got = getattr(parse(Module, argv), name)
    assert got == value
    assert type(got) is type(value)


def test_both_spellings_and_a_bare_word():
    @dataclass
    class Long:
        two_words: int = 0

    run, long = parse_settings([Run, Long], ["--two_words", "1", "smol", "--two-words", "2"])
    assert (run.model, long.two_words) == ("smol", 2)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: smol\nsteps: 5\ndepth: 4\nscale: 5e-5\nkind: none\nreport: no\n")
    argv = ["--depth", "6", "--config", str(file)]
    run, module = parse_settings([Run, Module], argv)
    assert (run.model, run.steps, run.report, module.depth, module.scale, module.kind, module.size) == (
        *("smol", 5, "no", 6, 5e-5, "none", None),
    )


def test_all_problems_come_in_one_error(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("dept: 3\nscale: big\nshared: 1\nsize: true\ninner: {width: x, wide: 1}\n")
    argv = ["--config", str(file), "--stepz", "3", "--steps", "0", "--kind", "kll", "--depth", "0", "--note"]
    problems = problems_of(Run, Module, argv=argv)
    said = "\n".join(problems)
    for words in (
        f"{file}: dept: unknown name, did you mean depth?",
        f"{file}: scale: got 'big' (str), wanted a number",
        f"{file}: shared: got 1 (int), wanted true or false",
        f"{file}: size: got True (bool), wanted a whole number or null",
        f"{file}: inner.width: got 'x' (str), wanted a whole number",
        f"{file}: inner.wide: unknown name, did you mean width?",
        "--stepz: unknown flag, did you mean --steps?",
        "--kind: got 'kll', wanted one of ce, kl, none, did you mean kl?",
        "--note: got no value, wanted text or null",
        "depth: got 0, wanted 1 or more",
        "model: got nothing, wanted text",
    ):
        assert words in said
    assert len(problems) == 11  # steps: 0 is not heard of, because Run cannot be made without its model
    assert "steps: got 0" in problems_of(Run, argv=["smol", "--steps", "0"])[0]


def test_a_refused_value_is_told_once():
    """The default stands in for it: what problems() then says about that field would be about a value nobody gave."""

    @dataclass
    class Late:
        start: int = 0
        end: int = 9

        def problems(self):
            return [f"start {self.start} and end {self.end} do not fit", "this one is about nothing refused"]

    assert problems_of(Late, argv=["--start", "x"]) == [
        "--start: got 'x', wanted a whole number",
        "this one is about nothing refused",
    ]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--depth", "3.5"], "--depth: got '3.5', wanted a whole number"),
        (["--depth", "--shared"], "--depth: got no value"),
        (["--shared", "maybe"], "maybe: no flag stands before it"),
        (["--shared=maybe"], "--shared: got 'maybe', wanted true or false"),
        (["--no-depth"], "--no-depth: unknown flag"),
        (["--pair", "1"], "--pair: got '1', wanted a list"),
        (["--pair", "1", "x"], "--pair: got 'x', wanted a number"),
        (["--colour", "rad"], "wanted one of red, blue, did you mean red?"),
        (["--draft", "audo"], "--draft: got 'audo', wanted a whole number or one of auto"),
        (["--extra", "{a: b}"], "--extra: got 'b' (str), wanted a whole number"),
        (["--extra", "{a: "], "--extra: got '{a: ', wanted a mapping"),
        (["--", "x"], "--: unknown flag"),
        (["--config"], "--config: got no value"),
        (["--config", "missing.yaml"], "missing.yaml: cannot be read: No such file"),
    ],
)
def test_a_bad_flag_is_refused(argv, said):
    problems = problems_of(Module, argv=argv)
    assert said in problems[0]
    assert len(problems) == 1 or argv[0] == "--"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("depth: 2\ndepth: 3\n", "line 2: not valid YAML: repeated key depth"),
        ("depth: 2\n  x: [\n", "line 2: not valid YAML"),
        ("- depth\n", "got list, wanted a mapping"),
        ("depth: '3'\n", "depth: got '3' (str), wanted a whole number"),
        ("weights: 3\n", "weights: got 3 (int), wanted a list (each a number) or null"),
        ("note: 3\n", "note: got 3 (int), wanted text or null"),
        ("1: 2\n", "1: unknown name"),
    ],
)
def test_a_bad_file_is_refused_with_its_name(tmp_path, text, said):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse(Module, ["--config", str(file)])
    assert said in str(caught.value)
    assert str(file) in str(caught.value)


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert parse(Module, ["--config", str(tmp_path / "empty.yaml")]) == Module()


def test_yaml_and_dicts_come_back_equal(tmp_path):
    module = Module(
        depth=7, kind="none", scale=1e-7, tied=False, weights=[1.0, 1e-5], note="no", folder=Path("x"), pair=(3, 1e20),
        colour=Colour.BLUE, extra={"a": 2}, draft=3, inner=Inner(9), names=["null", "1", "ü"],
    )  # fmt: skip
    (tmp_path / "m.yaml").write_text(to_yaml(module))
    assert parse(Module, ["--config", str(tmp_path / "m.yaml")]) == module
    assert from_dict(Module, to_dict(module)) == module
    with pytest.raises(ConfigError, match="dept: unknown name"):
        from_dict(Module, {"dept": 1})


def test_print_config_is_a_complete_config_file(tmp_path, capsys):
    argv = ["smol", "--depth", "5", "--colour", "blue"]
    with pytest.raises(SystemExit) as caught:
        parse_settings([Run, Module], [*argv, "--print-config"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert set(yaml.safe_load(text)) == {*Run.__dataclass_fields__, *Module.__dataclass_fields__}
    (tmp_path / "all.yaml").write_text(text)
    assert parse_settings([Run, Module], ["--config", str(tmp_path / "all.yaml")]) == parse_settings(
        [Run, Module], argv
    )
    assert problems_of(Run, argv=["smol", "--print-config", "--steps", "0"])  # not printed as if it were right


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse_settings([Run, Module], ["--help"], prog="foretell train")
    text = capsys.readouterr().out
    assert "usage: foretell train" in text
    for name in [*Run.__dataclass_fields__, *Module.__dataclass_fields__]:
        assert f"--{name.replace('_', '-')} " in text
    assert "Depths of the module. (a whole number; default 2)" in text
    assert "(text; required)" in text


def test_check_refuses_a_bad_instance_and_joins_the_other_problems():
    with pytest.raises(ConfigError, match="rate: got -1"):
        Checked(rate=-1)
    problems = problems_of(Checked, Module, argv=["--rate", "-1", "--depth", "0"])
    assert problems == ["rate: got -1.0, wanted more than 0", "depth: got 0, wanted 1 or more"]


@pytest.mark.parametrize(("value", "hint"), [(True, int), (1, bool), (1.0, int), ("1", int), (None, str), ([1], str)])
def test_plain_values_are_not_guessed_at(value, hint):
    with pytest.raises(TypeError, match=r"got .*, wanted "):
        coerce(value, hint)
    assert coerce(value, Any) == value


# transformers' TrainingArguments as one of the dataclasses


@pytest.fixture(scope="module")
def arguments():
    from transformers import TrainingArguments

    @dataclass
    class Arguments(TrainingArguments):
        """Training."""

        mode: Literal["joint", "standalone"] = field(default="joint", metadata={"help": "Who learns."})

        def __post_init__(self):
            made.append(self)
            super().__post_init__()

    made: list[Any] = []
    Arguments.made = made
    return Arguments


BASE = ["--output-dir", "x", "--use-cpu", "--report-to", "none"]


def test_training_arguments_are_read(arguments):
    argv = [
        *BASE,
        "--learning_rate",
        "5e-4",
        "--lr-scheduler-type",
        "cosine",
        "--bf16",
        "False",
        "--save-strategy",
        "no",
    ]
    argv += ["--lr-scheduler-kwargs", '{"num_cycles": 2}', "--mode", "standalone", "--logging-steps", "0.1"]
    args, module = parse_settings([arguments, Module], argv)
    assert (args.learning_rate, args.lr_scheduler_type.value, args.bf16) == (5e-4, "cosine", False)
    assert (args.save_strategy.value, args.lr_scheduler_kwargs, args.mode) == ("no", {"num_cycles": 2}, "standalone")
    assert (args.report_to, args.logging_steps, module.depth) == ([], 0.1, 2)


def test_training_arguments_are_made_last_and_their_errors_join(arguments):
    order = []

    @dataclass
    class Other:
        """Says when it is asked."""

        def problems(self):
            order.append(len(arguments.made))
            return ["other: wrong"]

    arguments.made.clear()
    argv = [*BASE, "--eval-strategy", "sometimes", "--learning-rat", "1"]
    problems = problems_of(arguments, Other, argv=argv)
    assert order == [0]
    assert len(arguments.made) == 1
    assert problems[0] == "--learning-rat: unknown flag, did you mean --learning-rate?"
    assert problems[1] == "other: wrong"
    assert "sometimes" in problems[2]
    assert len(problems) == 3


def test_training_arguments_come_back_from_yaml_without_secrets(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_settings([arguments], [*BASE, "--hub-token", "secret", "--print-config", "--seed", "7"])
    printed = capsys.readouterr().out
    args = parse_settings([arguments], [*BASE, "--hub-token", "secret", "--seed", "7"])[0]
    for text in (printed, to_yaml(args)):
        assert "secret" not in text
        (tmp_path / "args.yaml").write_text(text)
        again = parse(arguments, ["--config", str(tmp_path / "args.yaml")])
        assert (again.seed, again.output_dir, again.optim, again.report_to) == (7, "x", args.optim, [])


def test_help_shows_own_flags_in_full_and_names_the_inherited(arguments):
    from foretell.config import help_text

    text = help_text([arguments], "foretell train")
    assert "--mode  Who learns." in text
    assert "--learning-rate " not in text
    assert "learning_rate" in text
