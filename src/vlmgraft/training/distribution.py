"""A teacher's next-token distributions, whole or as its likeliest tokens and a rest, and the KL divergence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

FULL_VOCABULARY = 4096
TOP_K = 64


@dataclass(frozen=True)
class Distribution:
    """The teacher's log-probabilities at N answer tokens.

    ids None: `log_p` [N, vocabulary] is whole. Otherwise `log_p` [N, k + 1] belongs to `ids` [N, k], and its last
    column is the logarithm of the probability of everything else.
    """

    log_p: Float[Tensor, "N k"]
    ids: Int[Tensor, "N k"] | None

    @classmethod
    def of(cls, logits: Float[Tensor, "N vocabulary"], top_k: int = TOP_K) -> Distribution:
        """From the teacher's logits."""
        log_p = logits.float().log_softmax(-1)
        if log_p.shape[-1] <= max(FULL_VOCABULARY, top_k):
            return cls(log_p, None)
        values, ids = log_p.topk(top_k, dim=-1)
        return cls(torch.cat([values, _log_rest(values)], dim=-1), ids)

    def to(self, device: torch.device | str) -> Distribution:
        """The same distributions elsewhere."""
        return Distribution(self.log_p.to(device), None if self.ids is None else self.ids.to(device))

    def rows(self, start: int, stop: int) -> Distribution:
        """Those of the tokens from `start` to `stop`."""
        return Distribution(self.log_p[start:stop], None if self.ids is None else self.ids[start:stop])

    def kl(self, logits: Float[Tensor, "N vocabulary"]) -> Float[Tensor, " N"]:
        """KL(teacher ‖ student) per token in nats; with a rest bucket it is a lower bound of the whole one."""
        log_q = logits.float().log_softmax(-1)
        if self.ids is not None:
            values = log_q.gather(-1, self.ids)
            log_q = torch.cat([values, _log_rest(values)], dim=-1)
        elif log_q.shape[-1] != self.log_p.shape[-1]:  # vocabularies of one family differ by unused rows at the end
            shared = min(log_q.shape[-1], self.log_p.shape[-1])
            log_p = self.log_p[:, :shared].log_softmax(-1)
            return F.kl_div(log_q[:, :shared].log_softmax(-1), log_p, reduction="none", log_target=True).sum(-1)
        return F.kl_div(log_q, self.log_p, reduction="none", log_target=True).sum(-1)


def _log_rest(values: Tensor) -> Tensor:
    """log(1 − Σ exp(values)), at least 1e-7 inside the logarithm: below it float32 sums are rounding noise."""
    return torch.log((1 - values.exp().sum(-1, keepdim=True)).clamp_min(1e-7))
