"""What this project adds: orthonormal Spectron, a certified bound, ranks that adapt, adam-muon."""

from nativerank.reproduce.reading import Seen
from nativerank.reproduce.verdict import NOT, REPRODUCED, Verdict, below, not_above

RACE = "tokens"
ADAM_MUON, STIEFEL, ADAPTIVE = "adam-muon", "stiefel-spectron", "spectron[rank.adapt.threshold=0.97]"
SPECTRON, MUON = "spectron", "lowrank-muon"
SLACK = 0.03  # nats that an adaptive rank may cost


def judge(seen: Seen) -> dict[str, Verdict]:
    return {
        "certified": certified(seen),
        "adam-muon": below(seen.differences(RACE, ADAM_MUON, MUON)),
        "stiefel": below(seen.differences(RACE, STIEFEL, SPECTRON)),
        "adaptive": not_above(seen.differences("adaptive", ADAPTIVE, SPECTRON), SLACK),
    }


def certified(seen: Seen) -> Verdict:
    """The largest ||dW|| / eta on steps made to break the bound."""
    forms = {form["form"]: form for form in seen.outcome.measures["bound"]["cases"]}
    ours = {name: form for name, form in forms.items() if name.startswith("certified")}
    words = [f"{name}: {form['max_ratio']:.5g} of eta at most" for name, form in ours.items()]
    why = f"{next(iter(forms.values()))['cases']:,} steps made to break it: " + ", ".join(words)
    why += f"; the paper's form {forms['paper']['max_ratio']:.3g}"
    holds = bool(ours) and all(form["max_ratio"] <= 1 for form in ours.values())
    return Verdict(REPRODUCED if holds else NOT, why)
