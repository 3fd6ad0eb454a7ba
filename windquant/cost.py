"""What every step of the workflow costs: time, memory and disk by formulas, from a model's shape and the settings.

They count what a step does (products, searched weights, measured plans) and what it holds (one decoder layer, hidden
states, logits); the few rates of a machine turn that into seconds. docs/performance.md has the measurements they come
from, and how far the estimates were off.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from windquant import memory, presets, processor
from windquant.memory import GIB
from windquant.processor import Processor
from windquant.shape import Shape

Settings = Mapping[str, Mapping[str, Any]]  # by section of the configuration
FLOAT = 4  # bytes of a number in FP32
ALL_WINDOWS = 150  # of a test text that is taken whole, about WikiText-2's


@dataclass(frozen=True)
class Machine:
    """What turns work into seconds: rates that were measured, or (for a GPU) assumed."""

    name: str
    products: float  # floating-point operations a second of FP32 products
    fast: float  # of the products that may be BF16
    solves: float  # of the FP64 factorizations
    search: float  # weights a second through the trellis search with 4096 states
    decode: float  # packed weights a second
    read: float  # bytes a second from the disk
    start: float  # seconds until a step begins: imports and the model's frame
    memory: float  # bytes of a process before it has a model
    room: float  # bytes of memory that it has: what a step does with a model that is too large for it depends on that
    computing: int = 2  # bytes of a number where plans are measured
    beside: int = 1  # evaluations that run side by side, each on its share of the cores


#: What two cores do a second, fitted to main jobs (docs/performance.md): operations of FP32 products, of those that may
#: be BF16, and weights searched. By how the processor multiplies: BF16 faster than FP32 (an EPYC of the fourth
#: generation), vectors of 512 bits (a Xeon at 2.3 GHz) or of 256 (an EPYC of the third generation at 2.45 GHz).
RATES = {"bfloat16": (280e9, 720e9, 3.5e6), "wide": (215e9, 215e9, 3.5e6), "narrow": (62e9, 62e9, 1.7e6)}


def cpu(cores: int, found: Processor | None = None) -> Machine:
    """RATES in proportion to the cores. found: the processor; none: this machine's."""
    share = cores / 2
    found = found or processor.this()
    kind = "bfloat16" if found.fast_bfloat16 else "wide" if "avx512f" in found.flags else "narrow"
    products, fast, search = RATES[kind]
    return Machine(
        name=f"{cores} cores",
        products=products * share,
        fast=fast * share,
        solves=60e9 * share,
        search=search * share,
        decode=60e6 * share,
        read=1e9,
        start=4.0,
        memory=0.55 * GIB,
        room=memory.total(),
        computing=2 if found.fast_bfloat16 else 4,
        beside=min(cores, 2),
    )


#: Share of one core's fastest products that each core reaches in the steps: fitted to one main job, on an EPYC.
REACHED = 0.8


def this(cores: int) -> Machine:
    """So many of this machine's cores, by RATES or, where their products are slower than that, by these."""
    from windquant import pace  # torch takes seconds

    fitted = cpu(cores)
    products, fast = (REACHED * cores * rate for rate in pace.products())
    share = min(1.0, products / fitted.products)
    return replace(
        fitted,
        products=share * fitted.products,
        fast=min(fitted.fast, fast),
        solves=share * fitted.solves,
        search=share * fitted.search,
        decode=share * fitted.decode,
        start=fitted.start / share,
    )


def gpu(cores: int) -> Machine:
    """Assumed, not measured: an H200 at 40 % of its dense rates. The trellis search runs on the processor's cores."""
    host = cpu(cores)
    room = min(host.room, 139 * GIB)
    return Machine("H200 (assumed)", 20e12, 400e12, 10e12, host.search, 5e9, host.read, 12.0, 1.5 * GIB, room)


@dataclass(frozen=True)
class Need:
    """What one step takes."""

    seconds: float
    memory: float  # bytes, of the host
    gpu: float  # bytes, of the GPU; 0 without one
    disk: float  # bytes that it leaves; temporary ones included
    streamed: bool = False  # whether it goes layer by layer because the whole model has no place in memory
    beside: int = 1  # how many such jobs run at once


def needs(shape: Shape, settings: Settings, bits: float, machine: Machine, on_gpu: bool = False) -> dict[str, Need]:
    """By step; `settings` as `configuration.resolve` gives them."""
    costs = Costs(shape, settings, bits, machine, on_gpu)
    return {
        "model": costs.model(),
        "calibration": costs.calibration(),
        "statistics": costs.statistics(),
        "bank": costs.bank(),
        "search": costs.search(),
        "allocation": costs.allocation(),
        "quantize": costs.quantize(),
        "recovery": costs.recovery(),
        "perplexity_original": costs.perplexity(packed=False),
        "perplexity": costs.perplexity(packed=True),
        "zero_shot_original": costs.zero_shot(packed=False),
        "zero_shot": costs.zero_shot(packed=True),
    }


#: Steps that a result needs more than once: before and after recovery.
TIMES = {"perplexity": 2}


def seconds(wanted: Mapping[str, Need]) -> float:
    """Of a whole result: one step after another, but for the evaluations."""
    return sum(TIMES.get(step, 1) * need.seconds / need.beside for step, need in wanted.items())


def asked(held: float) -> float:
    """Bytes that the job of a step asks for which takes `held`: with room, and a cluster's Snakemake that starts it."""
    return 1.25 * held + GIB / 2


class Costs:
    """One method per step; what several of them ask for stands above."""

    def __init__(self, shape: Shape, settings: Settings, bits: float, machine: Machine, on_gpu: bool) -> None:
        self.shape, self.settings, self.machine, self.on_gpu = shape, settings, machine, on_gpu
        s, text = shape, settings["calibration"]
        # operations of one token: through the layers, the head, and the covariances of all inputs
        self.token, self.head = 2 * s.weights, 2 * s.vocabulary * s.hidden
        self.covariance = 0.65 * s.layers * sum(2 * columns**2 for columns in s.inputs)  # of symmetric matrices
        self.factors = s.layers * sum(2 * columns**3 for columns in s.inputs)  # operations
        # tokens
        self.calibrated = text["samples"] * text["length"]
        self.held_out = text["reward_samples"] * text["reward_length"]
        self.tested = (settings["evaluation"]["windows"] or ALL_WINDOWS) * text["context"]
        self.answered = 13_000 * len(settings["evaluation"]["tasks"])  # of a few hundred records
        # seconds
        self.reading, self.decoding = 2 * s.parameters / machine.read, s.weights / machine.decode
        self.searched = s.weights * 2.0 ** (settings["units"]["window"] - 12) / machine.search
        # bytes; resident is what a streaming pass holds: what is outside of the layers, one layer in use, one as stored
        self.whole, self.resident = FLOAT * s.parameters, FLOAT * s.outside + 6 * s.layer
        self.matrices = FLOAT * sum(columns**2 for columns in s.inputs) + 24 * max(s.inputs) ** 2
        self.packed = bits * s.weights / 8
        self.checkpoint = self.packed + 2 * s.outside

    def need(self, seconds: float, held: float, disk: float = 0, streamed: bool = False) -> Need:
        total = self.machine.memory + held
        return Need(self.machine.start + seconds, total, total if self.on_gpu else 0, disk, streamed)

    def fits(self, size: float) -> bool:
        return memory.fits(size, self.machine.room)

    def inside(self, tokens: int) -> int:
        """Bytes of a decoder layer's activations."""
        return FLOAT * tokens * (4 * self.shape.intermediate + 6 * self.shape.hidden)

    def model(self) -> Need:
        s, entry = self.shape, self.settings["model"]
        # a GGUF file is converted as a whole; other folders are only looked through
        gguf = entry.get("source") == "embedded" or str(entry.get("path", "")).endswith(".gguf")
        held = 1.4 * self.whole if gguf else FLOAT * s.vocabulary * s.hidden
        return self.need(10 + 2 * self.reading, held, 2 * s.parameters)

    def calibration(self) -> Need:
        return self.need(3, 0.1 * GIB, FLOAT * (self.calibrated + self.tested))

    def statistics(self) -> Need:
        s, m, text = self.shape, self.machine, self.settings["calibration"]
        settings = self.settings["statistics"]
        batch, samples = settings["batch"], min(settings["samples"], text["samples"])
        tokens, fisher = samples * text["length"], min(settings["fisher_samples"], samples) * text["length"]
        states = FLOAT * s.hidden * tokens
        losses = 5 * FLOAT * (batch // 4 or 1) * text["length"] * s.vocabulary
        return self.need(
            (tokens * self.token + fisher * 2 * (self.token + self.head)) / m.fast
            + tokens * self.covariance / m.products
            + self.factors / m.solves
            + 2 * self.reading,
            self.resident + max(states + self.matrices + self.inside(self.batch), losses),
            FLOAT * fisher * s.hidden * (s.layers + 1)
            + FLOAT * s.layers * (2 * sum(s.inputs) + sum(rows for rows, _ in s.linears)),
        )

    @property
    def batch(self) -> int:
        """Tokens of the calibration set that go through a layer at a time."""
        batch = self.settings["statistics"]["batch"] * self.settings["calibration"]["length"]
        return int(min(self.calibrated, batch))

    def bank(self) -> Need:
        s = self.shape
        largest = max(rows * columns for rows, columns in s.linears)
        jobs = self.settings["units"]["jobs"]  # side by side
        return self.need((s.weights * 128 / self.machine.products + self.reading) / jobs, 8 * largest, 200 * self.units)

    @property
    def units(self) -> int:
        return self.shape.units(self.settings["units"]["chunk"])

    @property
    def searches(self) -> bool:
        """Whether the search holds the whole model."""
        return self.fits(memory.SEARCH * self.machine.computing * self.shape.parameters)

    @property
    def measuring(self) -> tuple[float, float]:
        """Bytes of whatever measures plans: statistics and logits, and model and noise, of which half is noise."""
        s = self.shape
        largest = max(rows * columns for rows, columns in s.linears)
        kept = 2 * FLOAT * s.layers * (sum(s.inputs) + sum(rows for rows, _ in s.linears))
        computing = self.machine.computing
        logits = (8 * computing + 3 * FLOAT) * self.settings["calibration"]["reward_length"] * s.vocabulary
        held = 2 * computing * s.parameters if self.searches else computing * s.outside + 10 * s.layer + 12 * largest
        return kept + logits, held

    def search(self) -> Need:
        s, m, search = self.shape, self.machine, self.settings["search"]
        plans = search["evaluations"]
        drawing = 0 if self.searches or self.on_gpu else s.weights / 85e6  # noise of a measured plan
        rest, held = self.measuring
        return self.need(
            2 * plans * search["reward_tokens"] * (self.token + self.head) / m.fast
            + 2 * plans * 4 * s.weights / 2e9
            + search["episodes"] * self.units * 4e-5
            + (0 if self.searches else plans * (self.reading + drawing)),
            rest + held + 0.1 * GIB,  # of stable-baselines
            50_000,
            not self.searches,
        )

    def allocation(self) -> Need:
        """Of a learned plan, which is really quantized, and so is the Lagrangian one; half of the linears are alike.

        `evolution` holds what the search holds.
        """
        m, s = self.machine, self.shape
        rest, held = self.measuring
        text = 8 * self.settings["calibration"]["length"]  # tokens of a batch
        really = self.resident + self.matrices + self.inside(text) + 2 * FLOAT * s.layer  # and both plans' weights
        return self.need(
            3 * self.held_out * (self.token + self.head) / m.fast  # the original and both plans
            + 1.5 * self.searched
            + presets.CONFIRM_TOKENS * (self.token / m.fast + self.covariance / m.products)
            + 1.5 * self.factors / m.solves
            + self.reading,
            rest + max(held, really),
            100 * self.units,
            not self.searches,
        )

    def quantize(self) -> Need:
        m, text, taken = self.machine, self.settings["calibration"], self.settings["quantize"]
        own = min(taken["calibration_windows"] or text["samples"], text["samples"])
        tokens = own * text["length"]
        tokens += min(taken["recovery_windows"], text["recovery_samples"]) * text["recovery_length"]
        states = FLOAT * self.shape.hidden * tokens
        return self.need(
            self.searched
            + tokens * (2 * self.token / m.fast + self.covariance / m.products)
            + self.factors / m.solves
            + self.reading,
            self.resident + states + self.matrices + self.inside(self.batch),
            self.checkpoint,
        )

    def recovery(self) -> Need:
        """The student, whole with its gradients, or a layer of it; a layer of the teacher; hidden states, logits."""
        s, m, settings = self.shape, self.machine, self.settings["recovery"]
        window = self.settings["calibration"]["recovery_length"]
        steps = presets.recovery_steps(settings["preset"], settings["steps"])
        tokens, logits = steps * window, 11 * FLOAT * presets.DIVERGENCE_LOGITS
        whole = settings["scope"] == "model" or (
            settings["scope"] == "auto" and self.fits(memory.RECOVERY * s.parameters)
        )
        taught = min(steps, self.settings["calibration"]["recovery_samples"]) * window + self.held_out
        tuned = tokens * (5.5 * self.token + 4 * self.head) + taught * self.token
        states = FLOAT * s.hidden * taught
        spilled = states if states > self.machine.room / 4 else 0.0  # to a file
        held = memory.RECOVERY * s.parameters + s.layers * self.inside(window) + self.resident + states - spilled
        reading = self.reading
        if not whole:
            tuned += tokens * 2 * self.token  # every layer once more
            gains = 12 * s.weights / self.settings["units"]["chunk"]
            layers = FLOAT * s.outside + self.resident + 8 * s.layer + 10 * self.inside(window)
            held = layers + gains + states - spilled + FLOAT * s.hidden * s.layers * window
            reading += (2 * steps + 2) * self.decoding
        measured = self.held_out * (2 * self.token + 4 * self.head)
        rounded, beside = self.rounding()
        seconds = (tuned + rounded + measured) / m.fast + reading
        return self.need(seconds, max(held + logits, beside), self.checkpoint + spilled, not whole)

    def rounding(self) -> tuple[float, float]:
        """Operations and bytes of learned rounding: hidden states of both models, a layer of each and of its steps."""
        s, text, steps = self.shape, self.settings["calibration"], self.settings["recovery"]["rounding"]
        if not steps:
            return 0.0, 0.0
        batch = presets.ROUNDING_BATCH * text["recovery_length"]  # tokens of a step
        judges = presets.ROUNDING_JUDGES * batch
        tokens = min(steps, presets.ROUNDING_BATCHES) * batch + judges
        passes = 3 * steps * batch + presets.ROUNDING_CHECKS * judges + 2 * tokens
        states = min(2 * FLOAT * s.hidden * tokens, self.machine.room / 2)
        layers = 2 * self.resident + 20 * s.layer + 10 * self.inside(batch)
        return passes * self.token, layers + states

    def perplexity(self, packed: bool) -> Need:
        s = self.shape
        # hidden states of the text, and the logits of one window twice
        held = FLOAT * s.hidden * self.tested + 2 * FLOAT * self.settings["calibration"]["context"] * s.vocabulary
        work = self.tested * (self.token + self.head) / self.machine.products
        decoding, reading = (self.decoding, 0.0) if packed else (0.0, self.reading)
        return self.evaluation(work + decoding, reading, self.resident + held)

    def zero_shot(self, packed: bool) -> Need:
        """All tasks; each is a job of its own. In batches of 8, or of 32 where each of them reads the model."""
        jobs = len(self.settings["evaluation"]["tasks"])
        whole = self.fits(self.whole)
        batches = 0 if whole else self.answered / (32 * 100)
        held = (self.whole + (self.packed if packed else 0)) if whole else self.resident
        logits = (8 if whole else 32) * 512 * FLOAT * self.shape.vocabulary
        work = self.answered * (self.token + self.head) / self.machine.fast
        decoding, reading = (max(jobs, batches) * self.decoding, 0.0) if packed else (0.0, batches * self.reading)
        waiting = (jobs - 1) * self.machine.start + reading
        return self.evaluation(work + decoding, waiting, held + logits, streamed=not whole)

    def evaluation(self, work: float, waiting: float, held: float, streamed: bool = False) -> Need:
        """Side by side with others where their memory is there: of the seconds, `work` would be that of all cores."""
        beside = self.machine.beside
        while beside * asked(self.machine.memory + held) > self.machine.room and beside > 1:
            beside -= 1
        return replace(self.need(beside * work + waiting, held, streamed=streamed), beside=beside)
