"""The verdict on an LLC estimate: `ok`, `suspect` or `invalid`, with reasons in plain words.

Each rule is a named function of the evidence. Rules about the checkpoint and its basin are in `basin`. Rules about the chains are in
`chains`. The worst level among the broken rules is the verdict. Every broken rule gives a reason; the reasons are listed with the most
serious first. A note gives a reason without changing the verdict.
"""

from typing import NamedTuple, get_args

from icl.sampling.verdict import basin, chains
from icl.sampling.verdict.evidence import Evidence, Level, Rule, Verdict, evidence_of

__all__ = ["RULES", "VERSION", "Evidence", "Judgement", "Verdict", "evidence_of", "judge"]

RULES: tuple[Rule, ...] = (
    basin.checkpoint_not_finite,
    chains.data_not_finite,
    chains.some_data_not_finite,
    chains.most_chains_masked,
    chains.some_chains_masked,
    basin.negative,
    basin.escaped,
    basin.escaping,
    basin.rise_exceeds_pull,
    basin.not_at_a_minimum,
    basin.lower_loss_at_mean,
    basin.rises_with_localization,
    basin.diverged_down,
    basin.lower_loss_found,
    basin.below_zero,
    chains.not_significant,
    chains.bad_minibatches,
    chains.above_half_of_d,
    chains.step_size_bias,
    chains.mala_acceptance,
    chains.one_chain,
    chains.shared_minibatches,
    basin.not_spread_out,
    chains.r_hat,
    chains.effective_sample_size,
    chains.drift,
    chains.too_short_for_drift,
    basin.improper,
    basin.prior_dominated,
    chains.rounded_losses,
    basin.localization_outweighs,
    basin.mostly_flat,
    basin.localization_counts,
    chains.slight_step_size_bias,
    chains.target_not_reached,
    basin.slightly_lower_loss_at_mean,
    basin.too_few_chains_for_the_drop,
    basin.drop_not_measurable,
    basin.hardly_spread_out,
    basin.escape_not_checked,
)
"""All rules. Reasons of the same level are listed in the order of this tuple."""
VERSION = 5
"""Version of the rules. A stored estimate that was judged by an older version is computed again."""
_WORST_FIRST: tuple[Level, ...] = get_args(Level)


class Judgement(NamedTuple):
    """The verdict on an estimate."""

    verdict: Verdict
    reasons: tuple[str, ...]
    """Why the estimate may be wrong: one phrase for each broken rule, the most serious first."""
    broken: tuple[str, ...]
    """The names of the broken rules, without notes."""


def judge(evidence: Evidence) -> Judgement:
    """Apply all rules to the evidence."""
    broken = [(rule, reason) for rule in RULES if (reason := rule.reason(evidence)) is not None]
    broken.sort(key=lambda pair: _WORST_FIRST.index(pair[0].level))
    worst = broken[0][0].level if broken else "note"
    names = tuple(rule.name for rule, _ in broken if rule.level != "note")
    return Judgement("ok" if worst == "note" else worst, tuple(reason for _, reason in broken), names)
