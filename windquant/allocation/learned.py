"""What a search leaves behind: a policy that makes the plan of any budget of its range, in seconds, without a model.

One safetensors file: the policy's tensors, the loss model that it was trained in, and as JSON in the header what it was
made for. A policy reads features of its own version only, and makes plans from its own bank only.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from windquant import tensor_file
from windquant.allocation import layers
from windquant.allocation.budget import Choice, fill, limit
from windquant.allocation.features import VERSION, corrections, unit_features
from windquant.allocation.loss_model import LossModel
from windquant.allocation.network import actor, deterministic
from windquant.allocation.walk import Brief, Walk
from windquant.bank import Bank
from windquant.errors import WindquantError

FORMAT = 1


@dataclass(frozen=True)
class Learned:
    """The policy of one bank."""

    bank: str  # digest of the bank that the search was made with
    per: str  # what one decision is about: "chunk" or "layer"
    targets: tuple[float, float]  # bits that it was trained for: from, to
    actions: list[str]
    features: list[str]  # names of the unit features, in order
    directions: list[str]  # of the loss model's weights, in order
    hidden: int  # width of the network
    warm: bool  # the network starts as the Lagrangian plan
    reason: str = ""  # why there is no policy: nothing could be learned
    search: dict[str, Any] = field(default_factory=dict)  # what the search saw
    version: int = VERSION  # of the observation
    weights: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))  # [d + A] the most probable loss model
    told: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))  # [d + A] of them what the policy is told
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)  # of the policy, its critic included

    def check(self, bank: Bank, per: str = "chunk", transfer: bool = False) -> None:
        """Raise WindquantError if this is no policy by `per` for `bank`; `transfer`: if it cannot read its units."""
        if self.per != per:
            raise WindquantError(f"this policy decides by {self.per}, not by {per}; make a search with --per {per}")
        if self.bank != bank.sha256 and not transfer:
            raise WindquantError(
                f"this search was made with another bank (digest {self.bank[:12]}, here {bank.sha256[:12]}): its model "
                "or configuration is another one; make the search for this bank, or take it as it is with --transfer"
            )
        inner = self._inner(bank)
        names, _ = unit_features(inner)
        directions, _ = corrections(inner)
        for what, mine, theirs in (
            ("features", self.features, names),
            ("directions", self.directions, directions),
            ("actions", self.actions, bank.actions),
        ):
            if mine != theirs:
                odd = next((name for name in [*mine, *theirs] if (name in mine) != (name in theirs)), "the order")
                raise WindquantError(f"this search has other {what} than the bank ({odd}); make a search for this bank")

    def plan(self, bank: Bank, target_bits: float) -> Choice:
        """[U] the plan of the policy's best actions. The caller has checked that there is a policy and that it fits.

        Raises WindquantError if the target cannot be met.
        """
        inner = self._inner(bank)
        walk = Walk(inner, LossModel(inner))
        walk.begin(Brief(np.array([target_bits]), self.weights[None], self.told[None]))
        found = deterministic(actor(self.tensors, walk.layout, self.hidden, self.warm), walk)[0]
        choice = fill(inner, found, limit(inner, target_bits))
        if self.per == "chunk":
            return choice
        # what one more step of any layer would exceed goes to single chunks: allocators are compared at equal bits
        return fill(bank, layers.spread(bank, choice), limit(bank, target_bits))

    def doubt(self, target_bits: float) -> str:
        """Why the policy's plan for a target should not be taken unseen; empty where nothing speaks against it."""
        if self.reason:
            return self.reason
        if outside := self.outside(target_bits):
            return outside
        near = self._nearest(target_bits)
        if near is None:
            return ""
        if self.exploded(target_bits):
            return "the measured loss of the learned plans is not finite"
        if near["policy"] >= near["lagrangian"]:
            return f"the learned plan did not measure better at {near['target']:.4g} bits"
        return ""

    def outside(self, target_bits: float) -> str:
        """Why a target is not one of the search's; empty where it is."""
        low, high = self.targets
        return "" if low <= target_bits <= high else f"the search is for {low:g} to {high:g} bits (search.targets)"

    def exploded(self, target_bits: float) -> bool:
        """Whether the policy's measured plan nearest to a target has no finite loss."""
        near = self._nearest(target_bits)
        return near is not None and not math.isfinite(near["policy"])

    def _nearest(self, target_bits: float) -> dict[str, float] | None:
        """The measured pair of plans nearest to a target."""
        checks = self.search["checks"]
        return min(checks, key=lambda check: abs(math.log(check["target"] / target_bits)), default=None)

    def _inner(self, bank: Bank) -> Bank:
        return layers.merged(bank) if self.per == "layer" else bank

    def save(self, path: Path) -> None:
        arrays = {name: torch.as_tensor(getattr(self, name)) for name in ("weights", "told")}
        tensors = {f"policy/{name}": value for name, value in self.tensors.items()}
        document = {"format": FORMAT, **asdict(replace(self, tensors={}))}
        for name in ("weights", "told", "tensors"):
            del document[name]
        tensor_file.save(path, {name: value.clone() for name, value in (arrays | tensors).items()}, "search", document)

    @classmethod
    def load(cls, path: Path) -> "Learned":
        """Raises WindquantError for a file that is no search, or of another version."""
        try:
            tensors, document = tensor_file.load(path, "search")
            found = document.pop("format")
            if (found, document["version"]) != (FORMAT, VERSION):
                raise WindquantError(
                    f"{path}: a search of format {found} with features of version {document['version']}; this version "
                    f"reads format {FORMAT} with version {VERSION}: delete it and run again"
                )
            weights, told = (tensors.pop(name).numpy() for name in ("weights", "told"))
            policy = {name.removeprefix("policy/"): value for name, value in tensors.items()}
            document["targets"] = tuple(document["targets"])
            return cls(**document, weights=weights, told=told, tensors=policy)
        except tensor_file.UNREADABLE as error:
            raise WindquantError(f"{path}: not a readable search ({error!r}); delete it and run again") from error
