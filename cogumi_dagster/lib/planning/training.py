"""What training will take: tokens and steps of a profile, operations, memory and time, from shapes alone."""

from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path

from cogumi_dagster.lib.curation.sources import draw_source_examples
from cogumi_dagster.lib.planning.hardware import THIS_MACHINE, Device
from cogumi_dagster.lib.planning.shapes import ModelShape
from cogumi_dagster.lib.planning.sizes import adapter_parameters, nf4_bytes
from cogumi_dagster.lib.profile import LoraConfig, Profile
from cogumi_dagster.lib.strategy.problems import strategy_family
from cogumi_dagster.lib.teacher_data import domain_examples, domain_mix
from cogumi_dagster.lib.training.memory import fits_unpacked
from cogumi_dagster.lib.training.packing import KEEPS_SCORES

SAMPLE = 40
"""Tasks drawn a domain to see how long texts are."""
BYTES_A_TOKEN = 3.0
"""Of the solvers' code, sums and reasoning with SmolLM2's tokenizer; prose has 4.1."""
TEMPLATE_TOKENS = 30
"""Of a chat template around one question and answer."""
TRAIN_SHARE = 8 / 9
"""Source examples are of the splits train and validation, 80 and 10 of 100."""
SPARE_MEMORY = 0.95
"""What of a device's memory training may fill."""
RUNTIME_BYTES = {True: 750_000_000, False: 800_000_000}
"""Before the first weight: the process with its libraries on a CPU (True, measured), a GPU's context and libraries
(False, assumed)."""
ACTIVATION_OVERHEAD = {True: 1.5, False: 1.0}
"""What the peak holds over what autograd keeps, on a CPU (True): temporaries of the backward pass, and memory that is
freed and not given back. SmolLM2-135M in NF4: 1,667 MB in rows of 320 tokens and 2,914 in 640, planned 2,040 and 2,952.
A GPU's caching allocator reuses what is freed."""


@dataclass(frozen=True)
class Texts:
    """The examples of a profile, before they are made. Counts are means over a sample of its sources."""

    examples: int
    """At most: filters, deduplication and the mix leave some out."""
    tokens: float
    """Of one example: template, prompt and answer."""
    answer_tokens: float


@dataclass(frozen=True)
class TrainingRun:
    """One adapter's training, at most: the data may end before ``max_steps`` does."""

    what: str
    parameters: int
    """Trained ones."""
    tokens: int
    steps: int
    row_tokens: int
    """Tokens in one forward pass."""
    flops: float


@dataclass(frozen=True)
class DeviceEstimate:
    """One run on one device. Bytes at the profile's row, with all activations kept and with them recomputed."""

    device: str
    basis: str
    """Where the device's rates are from."""
    bytes_plain: int
    bytes_checkpointed: int
    device_bytes: int
    checkpointing: bool
    """Whether the estimate of speed recomputes: where the profile says so, or where it does not fit otherwise."""
    largest_row: int
    """Tokens of the largest row that fits with checkpointing; 0 where not even the weights fit."""
    tokens_per_second: float
    seconds: float

    @property
    def fits(self) -> bool:
        needed = self.bytes_checkpointed if self.checkpointing else self.bytes_plain
        return needed <= SPARE_MEMORY * self.device_bytes


def sample_texts(profile: Profile, sources: Path) -> Texts:
    """How many examples a profile draws and how long they are, from a few drawn tasks.

    Where the solver answers, its answers are measured; other teachers' count as half of ``teaching.max_tokens``.
    """
    examples = total = answers = 0.0
    for domain in profile.teaching.mix:
        wanted = domain_examples(profile, domain)
        tasks, _ = draw_source_examples(domain, sources, min(wanted, SAMPLE), profile.seed)
        count = min(wanted, len(tasks)) if len(tasks) < min(wanted, SAMPLE) else wanted
        solved = sum(entry.share for entry in domain_mix(profile, domain) if entry.teacher == "solver")
        for task in tasks:
            exact = len((task.solution or "").encode()) / BYTES_A_TOKEN
            answer = solved * exact + (1 - solved) * profile.teaching.max_tokens / 2
            answers += answer * count / len(tasks)
            total += (TEMPLATE_TOKENS + len(task.prompt.encode()) / BYTES_A_TOKEN + answer) * count / len(tasks)
        examples += count
    return Texts(round(TRAIN_SHARE * examples), total / examples, answers / examples)


def strategy_texts(profile: Profile) -> Texts:
    """The traces of a strategy, a mean over the profile's families, from a few of their lessons; a model's count as in
    ``sample_texts``."""
    strategy = profile.strategy
    lessons = [task for name in strategy.families for task in strategy_family(name).lessons(SAMPLE, profile.seed)]
    prompt, answer = (
        sum(len(text.encode()) for text in texts) / max(1, len(lessons)) / BYTES_A_TOKEN
        for texts in ([task.prompt for task in lessons], [task.solution or "" for task in lessons])
    )
    if strategy.teacher != "solver":
        answer = profile.teaching.max_tokens / 2
    return Texts(strategy.traces, TEMPLATE_TOKENS + prompt + answer, answer)


def base_run(shape: ModelShape, profile: Profile, texts: Texts) -> TrainingRun:
    """The base adapter's training."""
    return training_run("base adapter", shape, profile.training, texts, texts.examples * texts.tokens)


def other_runs(shape: ModelShape, profile: Profile, texts: Texts) -> list[TrainingRun]:
    """The modifiers' training, which depends on what the base gets wrong: at most all steps; and a strategy's."""
    runs = []
    for name, rank in profile.modifiers.rank.items():
        runs.append(training_run(f"modifier {name}", shape, profile.modifiers.training.of_rank(rank), texts))
    traces = strategy_texts(profile)
    return [*runs, training_run("strategy", shape, profile.strategy.training, traces, traces.examples * traces.tokens)]


def training_run(
    what: str, shape: ModelShape, config: LoraConfig, texts: Texts, epoch_tokens: float | None = None
) -> TrainingRun:
    """Tokens, steps and operations of one run; without ``epoch_tokens`` all of ``max_steps``."""
    tokens = config.max_steps * config.batch_tokens
    if epoch_tokens is not None:
        tokens = min(tokens, round(config.epochs * epoch_tokens))
    return TrainingRun(
        what=what,
        parameters=adapter_parameters(shape, config),
        tokens=tokens,
        steps=min(config.max_steps, ceil(tokens / config.batch_tokens)),
        row_tokens=config.row_tokens or config.batch_tokens,
        flops=tokens * flops_per_token(shape, config, texts, checkpointing=config.gradient_checkpointing),
    )


def flops_per_token(shape: ModelShape, config: LoraConfig, texts: Texts, *, checkpointing: bool) -> float:
    """Operations a trained token, as ``training.flops`` counts them.

    Frozen weights cost 2 forward and 2 backward (inputs' gradients only), so about 4N; trained ones 2 and 4; causal
    attention 2 x length x width a layer forward and twice that backward; the head only where a token is supervised.
    ``checkpointing`` adds the second forward pass.
    """
    passes = 3 if checkpointing else 2
    width = shape.num_attention_heads * shape.head_dim
    attention = shape.num_hidden_layers * 2.0 * min(texts.tokens, config.max_length) * width
    head = 4.0 * texts.answer_tokens / texts.tokens * shape.vocab_size * shape.hidden_size
    frozen, trained = 2.0 * passes * shape.linear_parameters, 2.0 * (passes + 1) * adapter_parameters(shape, config)
    return frozen + trained + (passes + 1) * attention + head


def on_device(shape: ModelShape, config: LoraConfig, run: TrainingRun, texts: Texts, device: Device) -> DeviceEstimate:
    """Memory and time of a run on a device."""
    row, overhead = run.row_tokens, ACTIVATION_OVERHEAD[device.name == THIS_MACHINE]
    fixed = fixed_bytes(shape, config, device)
    plain = fixed + round(row * overhead * token_bytes(shape, config, texts, device, checkpointing=False))
    each = overhead * token_bytes(shape, config, texts, device, checkpointing=True)
    checkpointed = fixed + round(row * each)
    room = SPARE_MEMORY * device.memory_bytes
    recompute = config.gradient_checkpointing or plain > room
    flops = flops_per_token(shape, config, texts, checkpointing=recompute)
    return DeviceEstimate(
        device=device.name,
        basis=device.basis,
        bytes_plain=plain,
        bytes_checkpointed=checkpointed,
        device_bytes=device.memory_bytes,
        checkpointing=recompute,
        largest_row=max(0, int((room - fixed) // each)),
        tokens_per_second=device.training_flops / flops,
        seconds=run.tokens * flops / device.training_flops,
    )


def fixed_bytes(shape: ModelShape, config: LoraConfig, device: Device) -> int:
    """What does not grow with the row: frozen weights (NF4 with ``load_in_4bit``, and room for one of them unpacked; on
    a CPU all of them unpacked, where they fit); for each trained weight its value, gradient and Adam's two moments in
    float32; the process.
    """
    rest = shape.parameters - shape.linear_parameters
    unpacked = device.name == THIS_MACHINE and fits_unpacked(
        device.item_bytes * shape.linear_parameters, device.memory_bytes
    )
    if config.load_in_4bit and not unpacked:
        largest = max(prod(size) for size in shape.linear.values())
        weights = nf4_bytes(shape) + (device.item_bytes - 2) * rest + device.item_bytes * largest
    else:
        weights = device.item_bytes * shape.parameters
    return weights + 16 * adapter_parameters(shape, config) + RUNTIME_BYTES[device.name == THIS_MACHINE]


def token_bytes(shape: ModelShape, config: LoraConfig, texts: Texts, device: Device, *, checkpointing: bool) -> float:
    """Bytes that one more token of a row takes until the backward pass: activations, and logits where supervised.

    Kept in a layer: both norms' inputs in float32; each LoRA's input, one a matrix where dropout or a cast makes copies
    (PEFT casts to float32 over layers that stay in four bits, see ``fused_lora``); its product with A; queries, keys,
    values and the attention's output, as many heads each; three of the feed-forward's width; and the scores of short
    examples on a CPU in bfloat16. With checkpointing only a layer's input is kept, and one layer at a time in full.
    """
    item, hidden, wide = device.item_bytes, shape.hidden_size, shape.intermediate_size
    width = shape.num_attention_heads * shape.head_dim
    on_cpu = device.name == THIS_MACHINE
    fused = on_cpu or not config.load_in_4bit
    lora_item = item if fused else 4
    copies = config.dropout > 0 or lora_item > item
    inputs = (5 if copies else 2) * hidden + width + wide
    layer: float = 8 * hidden + (lora_item + (config.dropout > 0)) * inputs + item * (4 * width + 3 * wide)
    layer += lora_item * (4 * config.rank_attention + 3 * config.rank_feed_forward)
    if on_cpu and item < 4:
        layer += 6 * shape.num_attention_heads * min(texts.tokens, KEEPS_SCORES) + 8 * width
    kept = shape.num_hidden_layers * item * hidden + layer if checkpointing else shape.num_hidden_layers * layer
    logits = texts.answer_tokens / texts.tokens * shape.vocab_size * (12 if item == 4 else 14)
    return kept + logits
