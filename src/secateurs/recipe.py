"""Recipes: strict TOML to frozen models. An unknown key, a wrong type, a bad value: one sentence that says where."""

import math
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from secateurs.allocators import ALLOCATORS, Allocator
from secateurs.calibration import region_weights
from secateurs.cuts import CUTS, Cut, FewerExperts, Hidden, Width
from secateurs.experts import EXPERT_SCORES, ExpertScore
from secateurs.goals import Goal, Propagate, check_goal
from secateurs.narrow import NARROWINGS, Narrowing
from secateurs.patterns import PATTERNS, Pattern, Unstructured
from secateurs.questions import QuestionSet, question_set, unknown_name
from secateurs.solvers import CUT_SOLVERS, SOLVERS, Solver
from secateurs.solvers.rounded import Rounded
from secateurs.traces import apply_filters
from secateurs.tune import Tune

Arm = str | dict[str, float]


def _spelled_out(pattern: Any) -> Any:
    """A string as "4:8" is short for {name = "nm", n = 4, m = 8}."""
    if not isinstance(pattern, str):
        return pattern
    if short := re.fullmatch(r"(\d+):(\d+)", pattern):
        return {"name": "nm", "n": int(short[1]), "m": int(short[2])}
    raise ValueError(f'a pattern is a table, as {{name = "unstructured", sparsity = 0.5}}, or "4:8"; found {pattern!r}')


PatternTable = Annotated[dict[str, Any], BeforeValidator(_spelled_out)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Sampling(_Table):
    """Overrides of the model's generation_config."""

    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    max_new_tokens: int = Field(default=1024, ge=1)


class EngineTable(_Table):
    """Who samples the traces: `hf`, in this process, or `openai`, servers at `servers` (`engines.openai.OpenAI`).

    `endpoint` is where the servers are asked: completions, with the prompt as it is, or chat, with its turns.
    """

    name: Literal["hf", "openai"] = "hf"
    servers: list[str] = []
    model: str = ""
    endpoint: Literal["completions", "chat"] = "completions"
    concurrency: int = Field(default=64, ge=1)
    timeout: float = Field(default=1800.0, gt=0)
    attempts: int = Field(default=10, ge=1)
    allow_retokenised: bool = False
    api_key_env: str = ""

    @model_validator(mode="after")
    def _reachable(self) -> "EngineTable":
        if self.name == "openai" and not (self.servers and self.model):
            raise ValueError(
                'engine "openai" needs `servers`, as in ["http://localhost:8000/v1"], and `model`, its name there'
            )
        if self.name == "hf" and (self.servers or self.model or self.endpoint == "chat"):
            raise ValueError('engine "hf" has no servers: did you mean name = "openai"?')
        return self

    @property
    def identity(self) -> Any:
        """What of it can change a trace, for the store's key. Where the servers stand cannot, nor can the endpoint
        that exact ids come from, as the prompt's ids are the same; it can where text is put together again."""
        if self.name == "hf":
            return "hf"
        pieced = {"endpoint": "chat"} if self.allow_retokenised and self.endpoint == "chat" else {}
        return {"name": self.name, "model": self.model, "ids": self.ids, **pieced}

    @property
    def ids(self) -> Literal["sampled", "retokenised"]:
        """Whether traces hold the ids that were sampled, or those of their text."""
        return "retokenised" if self.allow_retokenised else "sampled"


class Traces(_Table):
    """What the dense model is asked for its own chains of thought, and which of them are kept."""

    questions: dict[str, Any] = {"name": "tiny"}
    samples: int = Field(default=1, ge=1)
    engine: EngineTable = EngineTable()
    sampling: Sampling = Sampling()
    filters: dict[str, bool | int | float] = {}

    @field_validator("questions")
    @classmethod
    def _known_set(cls, value: dict[str, Any]) -> dict[str, Any]:
        build_questions(value)
        return value

    @field_validator("filters")
    @classmethod
    def _known_filters(cls, value: dict[str, bool | int | float]) -> dict[str, bool | int | float]:
        apply_filters([], value)
        return value

    @model_validator(mode="after")
    def _some_pass(self) -> "Traces":
        if (least := self.filters.get("min_tokens", 0)) > self.sampling.max_new_tokens:
            raise ValueError(
                f"filters.min_tokens is {least}, but no trace has more than {self.sampling.max_new_tokens} (sampling)"
            )
        return self


class Calibration(_Table):
    """Which tokens the solver sees: an arm (corpus, prompt, rac, think) or weights by region, and how many."""

    arm: Arm = "rac"
    num_tokens: int = Field(default=30_000, ge=1)
    held_out_tokens: int = Field(default=6_000, ge=1)
    batch_tokens: int = Field(default=2048, ge=1)
    """Padded tokens in a forward pass. Not a resource: another number rounds otherwise, and near-ties then turn."""
    first_tokens: int = Field(default=0, ge=0)
    """Only so many tokens of a completion calibrate; 0: all. Held-out traces stay whole."""
    corpus: str = ""
    """A file (`rows.py`) or data set of the hub (`hub.py`) for the region `corpus`; "" is the C4 sample that ships."""
    corpus_field: str = "text"
    corpus_tokens: int = Field(default=2048, ge=1)
    """Longer texts are cut into pieces of so many."""

    @field_validator("arm")
    @classmethod
    def _known_arm(cls, value: Arm) -> Arm:
        region_weights(value)
        return value


class TuneTable(_Table):
    """The fine-tune of every block after its solve (`tune.Tune`); 0 steps: none."""

    steps: int = Field(default=0, ge=0)
    rate: float = Field(default=Tune.rate, gt=0, lt=1)
    tokens: int = Field(default=Tune.tokens, ge=1)


class Prune(_Table):
    """What is removed, by which solver, seeing which inputs, to reproduce what."""

    pattern: PatternTable = {"name": "unstructured", "sparsity": 0.5, "scope": "layer"}
    solver: dict[str, Any] = {"name": "admm"}
    allocator: dict[str, Any] = {"name": "uniform"}
    propagate: Propagate = "block"
    goal: Goal = "own"
    tune: TuneTable = TuneTable()
    targets: list[str] = []
    ignore: list[str] = []

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, value: dict[str, Any]) -> dict[str, Any]:
        build_pattern(value)
        return value

    @field_validator("solver")
    @classmethod
    def _known_solver(cls, value: dict[str, Any]) -> dict[str, Any]:
        build_solver(value)
        return value

    @field_validator("allocator")
    @classmethod
    def _known_allocator(cls, value: dict[str, Any]) -> dict[str, Any]:
        build_allocator(value)
        return value

    @model_validator(mode="after")
    def _countable(self) -> "Prune":
        pattern = build_pattern(self.pattern)
        over_layer = isinstance(pattern, Unstructured) and pattern.scope == "layer"
        if self.allocator["name"] != "uniform" and not over_layer:
            raise ValueError(
                f"allocator `{self.allocator['name']}` gives every matrix a number of zeros, which only an "
                'unstructured pattern with scope = "layer" can have exactly'
            )
        return self

    @model_validator(mode="after")
    def _goal_can_differ(self) -> "Prune":
        check_goal(self.goal, self.propagate)
        return self


class Evaluate(_Table):
    """What dense and pruned models are asked; the question set defaults to the one the traces come from."""

    questions: dict[str, Any] | None = None
    num_questions: int = Field(default=200, ge=0)
    samples: int = Field(default=1, ge=1)
    sampling: Sampling | None = None

    @field_validator("questions")
    @classmethod
    def _known_set(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            build_questions(value)
        return value


class Sweep(_Table):
    """Lists to try in one run, which share traces and dense results; an empty list means the recipe's own value.

    `sparsity` is short for patterns that are the recipe's own at other sparsities."""

    arm: list[Arm] = []
    solver: list[dict[str, Any]] = []
    pattern: list[PatternTable] = []
    sparsity: list[float] = []
    seed: list[int] = []

    @field_validator("arm")
    @classmethod
    def _known_arms(cls, value: list[Arm]) -> list[Arm]:
        for arm in value:
            region_weights(arm)
        return value

    @field_validator("solver")
    @classmethod
    def _known_solvers(cls, value: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for solver in value:
            build_solver(solver)
        return value

    @field_validator("pattern")
    @classmethod
    def _known_patterns(cls, value: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for pattern in value:
            build_pattern(pattern)
        return value

    @field_validator("sparsity")
    @classmethod
    def _in_range(cls, value: list[float]) -> list[float]:
        for sparsity in value:
            build_pattern({"name": "unstructured", "sparsity": sparsity})
        return value


class Resources(_Table):
    """How the work is done. Changes results by float rounding at most, and is in no key but for `compute_dtype`."""

    device: str = "cpu"
    compute_dtype: Literal["auto", "checkpoint", "float32"] = "auto"
    """What a prune computes in; auto: float32 for 16-bit weights on a CPU without units for them, else as stored."""
    hidden_states: Literal["auto", "device", "cpu", "disk"] = "auto"
    """Where they wait between two blocks of a prune; auto: the first of these places that has room."""
    batch_size: int = Field(default=64, ge=1)
    trust_remote_code: bool = False


class Recipe(_Table):
    """One run: what to trace, calibrate, prune and evaluate."""

    title: str = ""
    model: str = Field(default="bundled", min_length=1)
    seed: int = 0
    traces: Traces = Traces()
    calibration: Calibration = Calibration()
    prune: Prune = Field(default_factory=Prune)  # its checks need what is defined below
    evaluate: Evaluate = Evaluate()
    sweep: Sweep = Sweep()
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _sweepable(self) -> "Recipe":
        if self.sweep.sparsity and self.sweep.pattern:
            raise ValueError("sweep.sparsity and sweep.pattern both say what to remove; give one of them")
        if self.sweep.sparsity and self.prune.pattern["name"] == "nm":
            raise ValueError("sweep.sparsity needs a prune.pattern with a sparsity; an N:M pattern has only one")
        names = product(map(arm_label, self.arms), map(_place, self.patterns), map(solver_label, self.solvers))
        repeated = [cell for cell, times in Counter(product(names, self.seeds)).items() if times > 1]
        if repeated:
            (arm, place, solver), seed = repeated[0]
            raise ValueError(
                f"sweep: two cells would have one name in the report: {arm}, {place}, {solver}, seed {seed}; leave "
                "repeats out, and give what differs in other ways runs of its own"
            )
        if self.prune.tune.steps and any("weights" in solver for solver in self.solvers):
            raise ValueError('a solver with weights = "int4" takes no tune, which would move what was rounded')
        for pattern, solver in product(self.patterns, self.solvers):
            built, name = build_pattern(pattern), solver["name"]
            cut, own_way = isinstance(built, Cut), isinstance(built, (FewerExperts, Hidden))
            allowed = next(names for kind, names in SOLVES if isinstance(built, kind))
            if name not in allowed:
                raise ValueError(
                    f"solver `{name}` cannot solve for pattern `{pattern['name']}`; those that can: "
                    + ", ".join(allowed)
                )
            if isinstance(built, Width) and built.score != "output" and name != "obs":
                raise ValueError(f'pattern `width` with score = "{built.score}" needs solver `obs`, found `{name}`')
            if own_way and (self.prune.goal != "own" or self.prune.tune.steps):
                raise ValueError(f"pattern `{pattern['name']}` has a way of its own: it takes no goal and no tune")
            if isinstance(built, Hidden) and self.prune.propagate != "block":
                raise ValueError("pattern `hidden` has a way of its own: it takes no propagate")
            if cut and (self.prune.targets or self.prune.ignore):
                raise ValueError(
                    f"pattern `{pattern['name']}` cuts every block alike: it takes no targets and no ignore"
                )
        return self

    @property
    def arms(self) -> list[Arm]:
        """The arms to try."""
        return self.sweep.arm or [self.calibration.arm]

    @property
    def solvers(self) -> list[dict[str, Any]]:
        """The solvers to try."""
        return self.sweep.solver or [self.prune.solver]

    @property
    def grid(self) -> "list[Recipe]":
        """The recipe of every cell for one seed: an arm, a pattern and a solver each, and nothing to sweep."""
        return [
            self.model_copy(
                update={
                    "calibration": self.calibration.model_copy(update={"arm": arm}),
                    "prune": self.prune.model_copy(update={"pattern": pattern, "solver": solver}),
                    "sweep": Sweep(),
                }
            )
            for pattern, solver, arm in product(self.patterns, self.solvers, self.arms)
        ]

    @property
    def seeds(self) -> list[int]:
        """The seeds to try."""
        return self.sweep.seed or [self.seed]

    @property
    def patterns(self) -> list[dict[str, Any]]:
        """The patterns to try."""
        own = self.prune.pattern
        return self.sweep.pattern or [own | {"sparsity": sparsity} for sparsity in self.sweep.sparsity] or [own]


# Which solvers can solve for a pattern: those of the first kind that it is of.
SOLVES: tuple[tuple[Any, Mapping[str, Any]], ...] = (
    (FewerExperts, EXPERT_SCORES),
    (Hidden, NARROWINGS),
    (Cut, CUT_SOLVERS),
    (object, SOLVERS),
)


def arm_label(arm: Arm) -> str:
    """An arm's name, or a mixture spelled out."""
    return arm if isinstance(arm, str) else "+".join(f"{weight:g}{region}" for region, weight in arm.items() if weight)


def pattern_label(spec: Mapping[str, Any]) -> str:
    """How a report calls a pattern, whose sparsity it has in another column."""
    built = build_pattern(spec)
    if not isinstance(built, Unstructured):
        return str(built)
    return "unstructured" if built.scope == "layer" else "unstructured per row"


def _place(spec: Mapping[str, Any]) -> str:
    """Where a report has a pattern."""
    return " ".join([pattern_label(spec), *(f"{100 * value:g} %" for key, value in spec.items() if key == "sparsity")])


def solver_label(spec: Mapping[str, Any]) -> str:
    """How a report calls a solver: its name, with the options that were set."""
    options = ", ".join(f"{key}={value}" for key, value in spec.items() if key != "name")
    return f"{spec['name']}({options})" if options else str(spec["name"])


def build_pattern(spec: Mapping[str, Any]) -> Pattern | Cut:
    """The pattern, or structured cut, a table describes. ValueError for an unknown name, key or value."""
    return _build("pattern", PATTERNS | CUTS, spec)


def build_solver(spec: Mapping[str, Any]) -> Solver | ExpertScore | Narrowing:
    """The solver a table describes; for experts the score, for `hidden` how. ValueError for an unknown name, key or
    value. Solvers of matrices may have `weights = "int4"`: what they find is rounded (`solvers.rounded`)."""
    of_matrices, name = SOLVERS | CUT_SOLVERS, spec.get("name")
    if not isinstance(name, str) or name not in of_matrices:
        return _build("solver", of_matrices | EXPERT_SCORES | NARROWINGS, spec)
    base = _build("solver", of_matrices, {key: spec[key] for key in spec if key != "weights"}, "weights")
    if spec.get("weights", "int4") != "int4":
        raise ValueError(f'solver `{name}`: weights can be "int4", found {spec["weights"]!r}')
    return Rounded(base=base) if "weights" in spec else base


def build_allocator(spec: Mapping[str, Any]) -> Allocator:
    """The allocator a table describes. ValueError for an unknown name, key or value."""
    return _build("allocator", ALLOCATORS, spec)


def build_tune(table: TuneTable) -> Tune | None:
    """The fine-tune a table describes; None for none."""
    return Tune(**table.model_dump()) if table.steps else None


def build_questions(spec: Mapping[str, Any]) -> QuestionSet:
    """The question set a table describes. ValueError for an unknown name, key or value."""
    options: dict[str, Any] = {
        key: tuple(map(tuple, v)) if key == "examples" else tuple(v) if isinstance(v, list) else v
        for key, v in spec.items()
    }
    if "name" not in options:
        raise ValueError("a question set needs a `name`")
    name = options.pop("name")
    return question_set(name, **options)


def _build(kind: str, table: Mapping[str, Any], spec: Mapping[str, Any], *also: str) -> Any:
    """An entry of `table` with the options of `spec`; the entry is a dataclass, or one with some fields fixed. `also`
    are keys that it could have had beside those."""
    options = dict(spec)
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in table:
        raise ValueError(unknown_name(kind, str(name), list(table)))
    entry: Any = table[name]
    fixed: dict[str, Any] = entry.keywords if isinstance(entry, partial) else {}
    factory: Any = entry.func if isinstance(entry, partial) else entry
    known = [key for key in factory.__dataclass_fields__ if key not in fixed]
    for key in options:
        if key not in known:
            raise ValueError(unknown_name(f"key of {kind} `{name}`", key, [*known, *also]))
    try:
        return TypeAdapter[Any](factory).validate_python(fixed | options)
    except ValidationError as error:
        first: Any = error.errors()[0]
        if first["type"] == "value_error":
            raise ValueError(first["ctx"]["error"]) from None
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{kind} `{name}`: {place}: {first['msg'].lower()}, found {first['input']!r}") from None


def recipe_path(name: str) -> Path:
    """The file of a recipe: a path, or the name of one that ships with the package. ValueError lists those."""
    if Path(name).is_file():
        return Path(name)
    shipped = {Path(entry.name).stem: Path(str(entry)) for entry in (files("secateurs") / "recipes").iterdir()}
    if name in shipped:
        return shipped[name]
    if name.endswith(".toml") or "/" in name:
        raise ValueError(f"recipe {name}: no such file")
    raise ValueError(unknown_name("recipe", name, list(shipped)))


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key.sub=value` overrides. ValueError in one sentence for anything wrong."""
    path = recipe_path(name)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        _override(data, override)
    return parse_recipe(data, str(path))


def _endless(value: Any, where: str = "") -> str:
    """The first number in a decoded recipe that is not finite, as `key.key = inf`; "" if there is none."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{where} = {value}"
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next(filter(None, (_endless(one, f"{where}.{key}".lstrip(".")) for key, one in inside)), "")


def parse_recipe(data: Mapping[str, Any], where: str) -> Recipe:
    """A Recipe from decoded TOML; `where` opens the sentence of an error."""
    if found := _endless(data):
        raise ValueError(f"{where}: {found}, but a number must be finite")
    try:
        return Recipe.model_validate(dict(data))
    except ValidationError as error:
        raise ValueError(f"{where}: {_first_error(error)}") from None


def _override(data: dict[str, Any], override: str) -> None:
    key, found, text = override.partition("=")
    if not found or not key.strip():
        raise ValueError(f"--set {override}: expected key=value, as in prune.pattern.sparsity=0.6")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.strip().split(".")
    table = data
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ValueError(f"--set {override}: `{parent}` is a value, not a table")
    table[last] = value


def _first_error(error: ValidationError) -> str:
    first: Any = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    where = ".".join(place)
    if first["type"] == "extra_forbidden":
        model: Any = Recipe
        for part in place[:-1]:
            model = model.model_fields[part].annotation
        return f"{unknown_name('key', where, ['.'.join([*place[:-1], name]) for name in model.model_fields])}"
    message = str(first["ctx"]["error"]) if "error" in first.get("ctx", {}) else first["msg"].lower()
    found = "" if first["type"] == "value_error" else f", found {first['input']!r}"
    return f"{where}: {message}{found}" if where else message
