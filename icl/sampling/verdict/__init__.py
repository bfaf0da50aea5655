"""The verdict on an LLC estimate: `ok`, `suspect` or `invalid`, with reasons in plain words.

Each rule is a named function of the evidence, in the module of its theme. The worst level among the broken rules is the verdict;
all broken rules give reasons, worst first. A note gives a reason without lowering the verdict.
"""

from typing import NamedTuple

from icl.sampling.verdict import basin, chains, checkpoint, localization, step_size
from icl.sampling.verdict.evidence import AtCheckpoint, Evidence, evidence_of
from icl.sampling.verdict.rule import Level, Rule, Verdict

__all__ = ["RULES", "VERSION", "AtCheckpoint", "Evidence", "Judgement", "Verdict", "evidence_of", "judge"]

RULES: tuple[Rule, ...] = (
    checkpoint.checkpoint_not_finite,
    chains.most_chains_masked,
    chains.some_chains_masked,
    checkpoint.negative,
    basin.escaped,
    basin.escaping,
    basin.beyond_the_rim,
    checkpoint.not_at_a_minimum,
    checkpoint.lower_loss_at_mean,
    checkpoint.diverged_down,
    checkpoint.lower_loss_found,
    checkpoint.below_zero,
    chains.not_significant,
    chains.bad_minibatches,
    step_size.above_half_of_d,
    step_size.too_hot,
    step_size.mala_acceptance,
    chains.one_chain,
    chains.shared_minibatches,
    chains.r_hat,
    chains.effective_sample_size,
    chains.drift,
    localization.not_spread_out,
    localization.prior_dominated,
    localization.localization_outweighs,
    localization.mostly_flat,
    step_size.warm,
    checkpoint.slightly_lower_loss_at_mean,
    checkpoint.too_few_chains_for_the_drop,
    checkpoint.drop_not_measurable,
    localization.hardly_spread_out,
    basin.escape_not_checked,
)
"""All rules. A broken rule that stands earlier gives its reason earlier among those of its level."""
VERSION = 2
"""Version of the rules; estimates that were judged by older rules are made again."""
_ORDER: tuple[Level, ...] = ("invalid", "suspect", "note")


class Judgement(NamedTuple):
    """The verdict on an estimate."""

    verdict: Verdict
    reasons: tuple[str, ...]
    """A sentence for each broken rule, worst first."""
    broken: tuple[str, ...]
    """The names of the broken rules, notes not counted."""


def judge(evidence: Evidence) -> Judgement:
    """Apply all rules to the evidence."""
    found = [(rule, reason) for rule in RULES if (reason := rule.reason(evidence)) is not None]
    found.sort(key=lambda pair: _ORDER.index(pair[0].level))
    levels = [rule.level for rule, _ in found]
    verdict: Verdict = "invalid" if "invalid" in levels else "suspect" if "suspect" in levels else "ok"
    broken = tuple(rule.name for rule, _ in found if rule.level != "note")
    return Judgement(verdict, tuple(reason for _, reason in found), broken)
