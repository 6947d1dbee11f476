"""What the page is told: every document, field by field.

A document has a key, such as `runs/0/compute`. The server answers GET /api/<key> with it; a file
that stands alone holds a mapping of keys to the same documents. Where one cannot be had, an
`{"error": one line}` stands in its place.

    overview                        Overview
    runs/<r>/compute                Compute
    runs/<r>/balance                Balance
    runs/<r>/passages               Passages
    runs/<r>/passages/<d>/<n>       Trace of passage n of domain d
    runs/<r>/specialization         Specialization
    runs/<r>/generation             Continuation; in a file only

Shapes: N tokens, E experts, K chosen by a token, A values of an attribute, S steps.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict


class Card(TypedDict):
    """A run in short; of a dense one `layers` is empty and the fields of experts are 0 or ""."""

    name: str  # below checkpoints/
    step: int | None  # of the last validation
    ce: float | None  # validation cross-entropy there, nats per token
    n_layers: int
    layers: list[int]  # the sparse ones
    n_experts: int
    top_k: int
    n_shared: int
    shared_gate: bool
    n_groups: int  # 1: no groups
    routing: str  # token_choice, expert_choice, hash
    balancing: str  # in words
    capacity_factor: float | None
    causal: bool
    total: int  # parameters
    active: int  # of those, met by one token
    prompt: str


class Overview(TypedDict):
    """What the page opens with: the runs, and whether there is a server behind it."""

    live: bool
    command: str  # that serves these runs
    version: str
    limits: dict[str, int]  # characters of a text, tokens to generate
    runs: list[Card]


class Layer(TypedDict):
    """What one sparse layer decided for N tokens; numbers to four digits after the point."""

    layer: int
    probs: list[list[float]]  # (N, E), summing to 1
    chosen: list[list[int]]  # (N, K), best first
    weights: list[list[float]]  # (N, K), what each expert's output is multiplied by
    dropped: list[list[int]] | None  # the experts that were full in training; None: no capacity
    bias: list[float] | None  # (E,), added to the scores before the choice; None: no bias


class Trace(TypedDict):
    """A text's way through a run."""

    tokens: list[str]
    nats: list[float] | None  # -log p of each token given those before; None: sees the future
    layers: list[Layer]
    cut: int  # tokens of the text beyond the context, left out
    domain: NotRequired[str]


class Domain(TypedDict):
    """A domain of the text by its number there."""

    number: int
    name: str


class Passages(TypedDict):
    """Domains that the validation split holds; `each` passages of every one can be had."""

    domains: list[Domain]
    each: int


class Extra(TypedDict):
    """What one more expert per token adds."""

    total: int
    active: int
    flops: int


class Model(TypedDict):
    """Sizes of a model; FLOPs are those of products with weights, attention's scores apart."""

    name: str
    note: str
    total: int
    active: int
    flops: int  # forward, per token
    n_experts: int
    top_k: float
    more: Extra
    rumour: bool


class Part(TypedDict):
    """Weights of one role in one place; `experts` counts equal blocks that a token chooses from."""

    kind: str
    params: int
    experts: int


class Band(TypedDict):
    """The weights of the embedding, of one layer, or of the head."""

    name: str
    layer: int | None
    parts: list[Part]


class Compute(TypedDict):
    """Parameters, FLOPs and bytes from the recipe alone."""

    run: Model
    twins: list[Model]  # dense: as wide as the experts a token visits, and as all of them
    bands: list[Band]
    bytes: dict[str, float]  # per weight, by precision
    attention_flops: int  # forward per token, at the full context, beside `flops`
    context: int
    published: list[Model]


class Load(TypedDict):
    """How one layer's tokens spread, step by step."""

    layer: int
    load: list[list[float]]  # (S, E) shares of all assignments
    max_vio: list[float]  # (S,)
    dead: list[int]  # (S,) experts without a token
    starved: list[int]  # (S,) experts below a tenth of an even share, dead ones included


class Balance(TypedDict):
    """A run's loads as training logged them, each an average over the steps since the last."""

    steps: list[int]
    tokens_per_step: int
    layers: list[Load]


class Information(TypedDict):
    """Bits that an attribute of a token tells about its expert, and what shuffling leaves of it."""

    attribute: str  # domain, kind, token
    bits: float
    control: float


class Expert(TypedDict):
    """What one expert takes."""

    share: float  # of all assignments of the layer
    most: list[tuple[str, int]]  # tokens by how often they come
    keenest: list[tuple[str, float]]  # frequent tokens by the share of their assignments that come


class Spread(TypedDict):
    """Assignments of one layer by attribute and expert."""

    layer: int
    entropy: float  # of the load, in bits: the most that anything can tell
    domains: list[list[int]]  # (A, E)
    kinds: list[list[int]]  # (A, E)
    information: list[Information]
    experts: list[Expert]


class Specialization(TypedDict):
    """Who visits which expert, over part of the validation split."""

    tokens: int
    of: int  # tokens in the split
    domains: list[str]
    kinds: list[str]
    layers: list[Spread]


class Choice(TypedDict):
    """What one sparse layer decided for one token."""

    layer: int
    probs: list[float]  # (E,)
    chosen: list[int]
    weights: list[float]


class Step(TypedDict):
    """One generated token."""

    token: str
    seconds: float  # since generating began
    choices: list[Choice]


class Settings(TypedDict):
    """How tokens are drawn."""

    tokens: int
    temperature: float
    top_p: float
    seed: int


class Continuation(TypedDict):
    """A prompt as the model read it, and what it went on with."""

    settings: Settings
    prompt: Trace
    steps: list[Step]
