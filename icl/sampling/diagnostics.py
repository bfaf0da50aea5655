"""The verdict on an LLC estimate: one table of rules, each with its level, its threshold and its source.

The worst level of the rules that an estimate breaks is its verdict, `ok`, `suspect` or `invalid`; all that are broken are
its reasons, worst first. A `note` says something without lowering the verdict. Amounts are in nats, as the LLC itself:
differences of loss times nbeta.

Two rules use an identity of the sampled density exp(-U) in d dimensions, E[(w - w0) . grad U] = d (integration by parts;
the equipartition theorem, and the Langevin-Stein operator of Gorham and Mackey 2015 applied to w - w0). It splits as
pull + spread = d: pull = nbeta E[(w - w0) . grad L], the directions that the data hold, and spread =
localization E|w - w0|^2, those that the localisation holds. Too large a step or too noisy a gradient heats the chain
beyond d: of moves of size lr, stationarity of |w - w0|^2 makes it d + (lr / 4) E|grad U|^2, the minibatch's gradient (for
a preconditioner G, in its metric). What the localisation alone makes of that, lr / 4 localization^2 |w - w0|^2, is there in
flat directions too, and harmless; half of the rest is the `heat`. It needs no direction to be in equilibrium and has
little noise. For quadratics it is once to twice what the step adds to the LLC: with a_i = nbeta h_i + localization the ratio is
1 + localization / a_i (`known.quadratic_llc`); of what the noise adds it is a_i / (nbeta h_i) times. And a loss that is convex along rays from w0 has pull >= LLC; a chain for
which this fails has passed the rim of its basin.

The same integration by parts, of f (w - w0) with f = nbeta (L - L0), says how the LLC answers to the localisation:
-d LLC / d log localization = (pull - Cov(f, (w - w0) . nbeta grad L)) / 2, the `sensitivity` (`convergence.sensitivity`). Of a
quadratic whose directions the data hold to the shares s_i = nbeta h_i / a_i it is half the sum of s_i (1 - s_i), and the LLC
half the sum of s_i: flat directions count in neither, and their ratio is above 1/2 where the localisation outweighs the data in
most of those that do. (For curvatures that fall off as a power it is the power that LLC falls by, at any localization.)
"""

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, TypeAlias

from icl.sampling.settling import threshold

Verdict: TypeAlias = Literal["ok", "suspect", "invalid"]
Level: TypeAlias = Literal["note", "suspect", "invalid"]

DIVERGED = 10.0
"""A chain whose mean excess is above this times d nats has diverged and is masked (ours: 20 times the LLC of a
nondegenerate minimum, the largest there is at a minimum; Watanabe 2009)."""


class Evidence(NamedTuple):
    """What the rules look at, of one estimate; means are over the chains used."""

    llc: float
    stderr: float
    num_params: int
    """Sampled dimensions d."""
    num_chains: int
    num_chains_used: int
    fallen: int
    """Chains that are masked as they found far lower loss."""
    init_loss: float
    mean_loss: float
    bad_batches: int
    """Whose loss is not finite at the checkpoint itself; the others make up `init_loss`."""
    trivial_loss: float | None
    rhat: float
    ess: float
    drift: float
    """Second half of the draws less the first, in nats."""
    drift_stderr: float
    acceptance: float
    """Of MALA, the mean over chains."""
    pull: float
    pull_stderr: float
    spread: float
    fill_stderr: float
    """Of pull + spread."""
    heat: float
    """By how much at most the step and the minibatches' noise raise the LLC, in nats (this module)."""
    heat_stderr: float
    descent: float
    """What one step along the gradient of the checkpoint gains, in nats."""
    descent_stderr: float
    settled: float
    """How much lower the loss is where the chains settle than at the checkpoint, in nats (`icl.sampling.settling`)."""
    settled_stderr: float
    settled_freedom: float
    """Degrees of freedom of that standard error."""
    lowest: float
    """The least excess of a draw, in nats; NaN where minibatches make losses noisy."""
    sensitivity: float
    """By how much the LLC falls as localization grows e-fold (this module)."""
    sensitivity_stderr: float
    localization: float
    share_batches: bool

    @property
    def rise(self) -> float:
        """How far the sampled loss lies above the checkpoint's."""
        return self.mean_loss - self.init_loss

    @property
    def headroom(self) -> float:
        """How far a trivial predictor's loss lies above the checkpoint's."""
        return math.nan if self.trivial_loss is None else max(self.trivial_loss - self.init_loss, 0.0)

    @property
    def filled(self) -> float:
        """The share of equipartition that the chains have reached; 1 in equilibrium, above it when heated."""
        return max(self.pull + self.spread, 0.0) / self.num_params

    @property
    def error(self) -> float:
        """The standard error, or 0 where there is none."""
        return 0.0 if math.isnan(self.stderr) else self.stderr

    @property
    def dead(self) -> int:
        """Chains that are masked."""
        return self.num_chains - self.num_chains_used

    @property
    def lost(self) -> int:
        """Chains that are masked for another reason than far lower loss."""
        return self.dead - self.fallen

    @property
    def deaths(self) -> str:
        """What became of the chains that are masked."""
        ways = {
            "diverged or became non-finite (lower lr)": self.lost,
            "fell far below the checkpoint's loss": self.fallen,
        }
        return " and ".join(f"{num} {way}" for way, num in ways.items() if num)

    @property
    def least_settled(self) -> float:
        """How far the chains must settle below the checkpoint's loss to be told from chance."""
        return threshold(self.settled_freedom) * self.settled_stderr

    @property
    def settles(self) -> bool:
        """Whether the chains settle below the checkpoint's loss by more than chance."""
        return self.settled > self.least_settled

    @property
    def settled_share(self) -> float:
        """What the chains settle by, as a share of the LLC about the place where they do."""
        llc = 0.0 if math.isnan(self.llc) else self.llc
        return self.settled / max(llc + self.settled, 1e-300)


class Rule(NamedTuple):
    """One line of the table."""

    name: str
    level: Level
    threshold: float
    source: str
    is_broken: Callable[[Evidence, float], bool]
    reason: str
    """With fields of the evidence, and `t` for the threshold."""


RULES = (
    Rule(
        "checkpoint not finite", "invalid", 0, "fixed outcome",
        lambda e, t: math.isnan(e.init_loss),
        "the loss of the checkpoint itself is not finite on any minibatch",
    ),
    Rule(
        "most chains dead", "invalid", 0.5, "fixed outcome",
        lambda e, t: e.num_chains_used < t * e.num_chains or e.num_chains_used == 0,
        "{dead} of {num_chains} chains are masked: {deaths}",
    ),
    Rule(
        "some chains dead", "suspect", 0, "fixed outcome",
        lambda e, t: e.lost > t and e.dead <= e.num_chains / 2,
        "{lost} of {num_chains} chains diverged or became non-finite and are masked: lower lr",
    ),
    Rule(
        "negative", "invalid", 2, "fixed outcome: LLC + 2 stderr < 0, but an LLC at a minimum is positive (Watanabe 2009)",
        lambda e, t: e.llc + t * e.error < 0,
        "negative LLC: the chains found lower loss than the checkpoint's, which is not a minimum",
    ),
    Rule(
        "escaped", "invalid", 0.5, "PAPERS 1.5: trust E[L] - L0 << L_trivial - L0; the fraction is ours",
        lambda e, t: e.trivial_loss is not None and e.rise > t * e.headroom,
        "escaped: the mean sampled loss {mean_loss:.4g} against {init_loss:.4g} at the checkpoint and {trivial_loss:.4g} "
        "of a trivial predictor; the estimate mirrors the loss, not the geometry: raise nbeta or localization",
    ),
    Rule(
        "escaping", "suspect", 0.1, "as above; the fraction is ours",
        lambda e, t: e.trivial_loss is not None and t * e.headroom < e.rise <= 0.5 * e.headroom,
        "escaping: the loss rose by {rise:.3g}, over a tenth of the {headroom:.3g} to a trivial predictor: raise nbeta or "
        "localization",
    ),
    Rule(
        "beyond the rim", "suspect", 3, "a loss convex along rays has pull >= LLC (this module); standard errors",
        lambda e, t: e.llc - e.pull > t * math.hypot(e.stderr, e.pull_stderr) and e.llc - e.pull > 0.1 * e.llc,
        "escaping: the loss pulls the chains back ({pull:.3g} nats) by less than it rose ({llc:.3g}), so they are past the "
        "rim of the basin: raise nbeta or localization",
    ),
    Rule(
        "not at a minimum", "suspect", 0.2, "definition of the LLC; the share of it is ours",
        lambda e, t: e.descent > 3 * e.descent_stderr and e.descent > max(t * abs(e.llc), 0.1),
        "not at a minimum: one step along the gradient lowers nbeta times the loss by {descent:.3g}",
    ),
    Rule(
        "settles lower", "suspect", 0.1, "definition of the LLC; the share of it is ours",
        lambda e, t: e.settles and e.settled > 0.1 and e.settled_share > t,
        "not at a minimum: nbeta times the loss is lower by {settled:.3g} where the chains settle, and the LLC too low by about that",
    ),
    Rule(
        "fell", "suspect", 0, "as `DIVERGED`, downwards",
        lambda e, t: e.fallen > t,
        "not at a minimum: {fallen} of {num_chains} chains fell by more than {depth:g} nats and are masked",
    ),
    Rule(
        "lower loss found", "suspect", 0.05, "definition of the LLC; the share of it is ours",
        lambda e, t: -e.lowest > max(t * abs(e.llc), 0.1),
        "not at a minimum: a chain passed a place {depth_found:.3g} nats below the checkpoint",
    ),
    Rule(
        "below zero", "suspect", 2, "as `negative`, within the error",
        lambda e, t: e.llc < 0 <= e.llc + t * e.error,
        "the LLC is below zero, within its error",
    ),
    Rule(
        "not told from zero", "suspect", 2, "standard errors",
        lambda e, t: 0 <= e.llc < t * e.error,
        "the LLC, {llc:.3g} ± {stderr:.2g}, is not told from zero: take more draws or larger batches",
    ),
    Rule(
        "bad minibatches", "suspect", 0, "fixed outcome: the rest is averaged",
        lambda e, t: e.bad_batches > t and not math.isnan(e.init_loss),
        "on {bad_batches} minibatches the loss of the checkpoint itself is not finite: look at the data",
    ),
    Rule(
        "above d/2", "suspect", 1.1, "an LLC at a minimum is at most d/2 (Watanabe 2009); the tenth is ours",
        lambda e, t: e.llc - 3 * e.stderr > t * e.num_params / 2,
        "the LLC is above d/2 = {half:g}, the most there is at a minimum: lower lr, or use larger batches",
    ),
    Rule(
        "too hot", "suspect", 0.1, "stationarity (this module); the share of the LLC is ours",
        lambda e, t: e.heat > 3 * e.heat_stderr and e.heat > max(t * abs(e.llc), 2 * e.error),
        "the step size or the minibatch noise heats the chains; the LLC may be too high by {heat:.3g}: lower lr, or use "
        "larger batches",
    ),
    Rule(
        "MALA acceptance", "suspect", 0.5, "Roberts and Rosenthal 1998: 0.574 is best for MALA; SGLD, which accepts all, should do better",
        lambda e, t: e.acceptance < t,
        "MALA would accept {acceptance:.0%} of the moves, out of range: lower lr",
    ),
    Rule(
        "one chain", "suspect", 2, "fixed outcome: R-hat needs two",
        lambda e, t: e.num_chains_used == 1,
        "one chain only: nothing to compare it with",
    ),
    Rule(
        "shared minibatches", "suspect", 0, "fixed outcome",
        lambda e, t: e.share_batches,
        "chains share their minibatches: their common noise is missing from stderr",
    ),
    Rule(
        "R-hat", "suspect", 1.05, "Vehtari et al. 2021 ask for 1.01 at an ESS of 400; 1.05 suits an ESS of 100",
        lambda e, t: e.num_chains_used > 1 and not e.rhat <= t,
        "R-hat is {rhat:.3f}, above {t}: the chains disagree; run them longer",
    ),
    Rule(
        "effective sample size", "suspect", 100, "Vehtari et al. 2021: 50 a split chain for a standard error worth having",
        lambda e, t: e.num_chains_used > 0 and not e.ess >= t,
        "the effective sample size is {ess:.0f}, below {t}: take more draws or chains",
    ),
    Rule(
        "drift", "suspect", 0.1, "Geweke 1992, halves compared; the share of the LLC is ours",
        lambda e, t: abs(e.drift) > 3 * e.drift_stderr and abs(e.drift) > t * abs(e.llc),
        "the loss drifts after burn-in, by {drift:+.3g} nats from the first half of the draws to the second: lengthen the burn-in",
    ),
    Rule(
        "not spread out", "suspect", 0.8, "equipartition (this module); the share of d is ours",
        lambda e, t: e.localization > 0 and e.pull + e.spread + 3 * e.fill_stderr < t * e.num_params,
        "the chains fill {filled:.0%} of what the localisation allows, and the LLC changes as flat directions fill: lengthen "
        "the burn-in (3 / (lr localization) moves fill 95%)",
    ),
    Rule(
        "prior-dominated", "suspect", 1e-3, "pull is the effective number of parameters (MacKay 1992); half of one, or a thousandth, is ours",
        lambda e, t: e.spread > e.num_params / 2 and e.pull < max(0.5, t * e.num_params),
        "prior-dominated: the data hold {pull:.3g} of {num_params} directions: raise nbeta, or lower localization",
    ),
    Rule(
        "localisation outweighs", "suspect", 2 / 3, "integration by parts (this module); of a single curvature that is twice the data's weight",
        lambda e, t: e.localization > 0 and e.sensitivity - 3 * e.sensitivity_stderr > t * max(e.llc, 0.0),
        "prior-dominated: localization, not the data, decides the LLC, which would fall by {sensitivity:.3g} if localization grew "
        "2.7-fold: raise nbeta, or lower localization",
    ),
    Rule(
        "mostly flat", "note", 0.5, "as above",
        lambda e, t: e.spread > t * e.num_params and e.pull >= max(0.5, 1e-3 * e.num_params),
        "note: localisation holds most directions, the data {pull:.3g} of {num_params}; the LLC falls by {sensitivity:.2g} ± "
        "{sensitivity_stderr:.1g} if localization grows 2.7-fold",
    ),
    Rule(
        "warm", "note", 2, "as `too hot`; standard errors",
        lambda e, t: e.heat > 3 * e.heat_stderr and t * e.error < e.heat <= 0.1 * abs(e.llc),
        "note: the step size and the minibatch noise raise the LLC by up to {heat:.3g}, more than its standard error shows",
    ),
    Rule(
        "settles a little lower", "note", 2, "as `settles lower`; standard errors",
        lambda e, t: e.settles and e.settled > t * e.error and (e.settled <= 0.1 or e.settled_share <= 0.1),
        "note: nbeta times the loss is lower by {settled:.3g} where the chains settle, and the LLC too low by about that, which its "
        "standard error does not contain",
    ),
    Rule(
        "settling unsure", "note", 4, "Student's t: of two chains 236 standard errors are as rare as 3, of three 19, of four 9",
        lambda e, t: 1 < e.num_chains_used < t,
        "note: {num_chains_used} chains can hardly tell whether they settle below the checkpoint's loss: use four or more",
    ),
    Rule(
        "settling not told", "note", 0.1, "as `settles lower`",
        lambda e, t: e.num_chains_used >= 4 and e.least_settled > max(t * abs(e.llc), 2 * e.error, 0.1),
        "note: whether the chains settle below the checkpoint's loss, as beside a minimum, is told from {least_settled:.2g} nats on only: "
        "raise num_init_batches, or use larger batches",
    ),
    Rule(
        "hardly spread out", "note", 0.95, "as `not spread out`",
        lambda e, t: e.localization > 0 and e.filled < t and e.pull + e.spread + 2 * e.fill_stderr < e.num_params,
        "note: the chains fill {filled:.0%} of what the localisation allows; a longer burn-in may change the LLC",
    ),
    Rule(
        "escape not checked", "note", 0, "fixed outcome",
        lambda e, t: e.trivial_loss is None,
        "note: escape from the basin was not checked; give `trivial_loss`",
    ),
)  # fmt: skip
"""All rules, the gravest first."""
VERSION = 2
"""Of the rules; what was judged by older ones is judged anew."""


def judge(evidence: Evidence) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict and its reasons."""
    broken = [rule for rule in RULES if rule.is_broken(evidence, rule.threshold)]
    order: dict[Level, int] = {"invalid": 0, "suspect": 1, "note": 2}
    broken.sort(key=lambda rule: order[rule.level])
    return _worst(rule.level for rule in broken), tuple(_told(rule, evidence) for rule in broken)


def _worst(levels: Iterable[Level]) -> Verdict:
    found = set(levels)
    return "invalid" if "invalid" in found else "suspect" if "suspect" in found else "ok"


def _told(rule: Rule, evidence: Evidence) -> str:
    names = (*Evidence._fields, "rise", "headroom", "filled", "dead", "lost", "deaths", "least_settled")
    numbers = {name: getattr(evidence, name) for name in names}
    found = {"half": evidence.num_params / 2, "depth": DIVERGED * evidence.num_params, "depth_found": -evidence.lowest}
    return rule.reason.format(**numbers, **found, t=rule.threshold)
