"""Muon for a module's matrices and AdamW for all else, as one optimizer with one state: saved and resumed as any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but groups that say muon=True go through torch.optim.Muon, whose update is brought to the size of AdamW's
    (0.2 sqrt(max(rows, columns)) times an orthogonal matrix), so that both understand a rate alike.
    """

    param_groups: list[dict[str, Any]]

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        matrices = [p for group in groups if group["muon"] for p in group["params"]]
        self._muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")
        own = {name: value for name, value in self._muon.defaults.items() if name not in ("lr", "weight_decay", "eps")}
        own["ns_eps"] = self._muon.defaults["eps"]
        settings = {name: value for name, value in settings.items() if name != "decoupled_weight_decay"}  # AdamW's own
        super().__init__([own | group if group["muon"] else group for group in groups], **settings)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """See Optimizer."""
        every: list[dict[str, Any]] = self.param_groups
        try:
            self.param_groups = [group for group in every if not group["muon"]]
            loss = super().step(closure)
        finally:
            self.param_groups = every
        # AdamW's groups have an eps as well, of another meaning
        self._muon.param_groups = [{**group, "eps": group["ns_eps"]} for group in every if group["muon"]]
        self._muon.state = self.state
        self._muon.step()
        for parameter in (p for group in self._muon.param_groups for p in group["params"]):
            self.state[parameter].setdefault("step", torch.zeros(()))  # AdamW asks for it when a state is loaded
        return loss
