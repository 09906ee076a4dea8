"""Words around a number -> what it is said to be: its kind, its statistic, whose it is."""

import re
from dataclasses import dataclass, field, replace
from functools import lru_cache

UNITS = {"ms": 1e-3, "s": 1, "sec": 1, "secs": 1, "second": 1, "seconds": 1, "min": 60, "mins": 60, "minute": 60,
         "minutes": 60, "h": 3600, "hours": 3600}
PER_STEP = {"ms/step": "ms", "s/step": "s"}
NUMBER = re.compile(r"(?<![\w.#])(?<!\w[/-])(?<!\w[’'])([+-]?\d+(?:[.,]\d+)*(?:e[+-]?\d{1,3})?|[+-]?\.\d+)"
                    r"(\s?-?(?:%|[A-Za-zµ]+(?:/[A-Za-z]+)?)?)", re.ASCII)
NOWHERE = {"loss": (0, 0), "time": (0, 0)}


@dataclass
class Number:
    """A number as it is written. `digit`: what one more in its last digit is worth."""

    value: float
    digit: float
    unit: str
    text: str


@dataclass
class Claim:
    """One number and what is said of it. `kind`: loss, time, step time, n, steps, p, t, d (Cohen's), percent.
    `statistic`: mean, sd, spread (after ±), median, min, max, range, interval, result (a mean or a run), target,
    difference, or "" for unknown."""

    kind: str
    statistic: str
    text: str
    value: float  # seconds for times
    digit: float
    relation: str = "="  # or <, >, ~
    about: str = ""  # of p and t: loss or time
    subject: str = ""  # words that may name an arm or a log
    label: str = ""  # of its row
    cells: tuple = ()  # of its row, which may name a log
    seed: str = ""  # in its row
    section: str = ""  # the heading or label above
    intro: str = ""  # of a table: the sentences before it
    around: str = ""  # the words next to it
    quote: str = ""  # the sentence or row
    scope: tuple = ()  # claims of one scope are about one thing
    sure: bool = False  # in a table, or called by its name: it is what it is taken for
    every: int | None = None  # runs that are said to be all below or above it, 0 for "all"
    change: str = ""  # "from" or "to": an end of "84.9 s to 82.3 s"
    line: int = 0
    at: int = 0  # where in its sentence


@dataclass
class Place:
    """A number in a sentence: the words since the last number, those until the next one, all before it."""

    number: Number
    before: str
    after: str
    reach: str
    last: Claim | None  # the claim before it
    ranges: dict = field(default_factory=lambda: NOWHERE)  # {"loss" or "time": those of the runs, a little wider}


def words(*alternatives):
    """A pattern that finds one of the words, which may be glued with _ or digits (val_loss)."""
    return re.compile(rf"(?<![A-Za-z])(?:{'|'.join(alternatives)})(?![A-Za-z])", re.I)


KINDS = {  # in order of precedence where one name has several
    "p": re.compile(r"(?<![\w-])p(?:[- ]?val(?:ue)?s?)?(?![\w-])", re.I),
    "t": re.compile(r"(?<![\w-])t(?:[- ]?(?:stat(?:istic)?|value))?(?![\w/-])", re.I),
    "d": words("cohen.{0,3}s d", "effect size"),
    "step time": words("per[- ]step", "step[ _-]?(?:time|avg|average)s?", "ms ?/ ?step", "s ?/ ?step"),
    "n": words("n", "runs", "trials", "logs", "samples", "count"),
    "steps": words("steps?", "iterations", "iters"),
    "loss": words("loss(?:es)?", "accs?", "val"),
    "time": words("times?", "traintime", "train s", "runtime", "wall[- ]?clock", "seconds", "duration", "timing"),
}
STATISTICS = {
    "difference": words(
        r"improve\w*", "faster", "slower", "speed-?ups?", "sav(?:e|es|ed|ing|ings)", "gain(?:s|ed)?", "delta", "diff",
        "differences?", "differs", r"reduc\w*", r"decrease\w*", r"increase\w*", "fewer", r"drop\w*", "cuts?",
        "overhead", "costs?", "regression", "less", "shorter", "longer", "trades", "add(?:s|ed)?", "extra", r"remov\w*",
        "shift", "gap", "margin", "slow-?down", "falls?", "fell", "ris(?:e|es|en)", "rose"),
    "sd": words("std(?:ev|_dev|dev)?", "sd", "standard deviations?", "sigma", "stddev", "variance"),
    "mean": words("means?", r"averag\w*", "avg"),
    "median": words("median"),
    "min": words("min", "minimum", "best", "lowest", "fastest"),
    "max": words("max", "maximum", "worst", "highest", "slowest"),
    "range": words("range"),
    "interval": words("intervals?", "confidence", "ci"),
    "target": words("target", "threshold", "limit", "cut-?off", "rules?"),
}
SIGNS = {"Δ": "difference", "σ": "sd", "μ": "mean"}
COUNTED = ("n", "steps", "p", "t", "d")  # have no statistic
SINGLE = ("mean", "sd", "median", "min", "max")


# -- numbers and names


def number_of(match):
    """Number of a match of NUMBER; None if it is part of something else: a date, a version, 12-wide."""
    digits, rest, after = match[1], match[2].strip().lstrip("-"), match.string[match.end():match.end() + 1]
    thousands = re.fullmatch(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?", digits)
    if ("," in digits and not thousands) or len(digits) > 40:
        return None
    unit = "" if rest == "min" and after in (":", "=") else rest.lower()  # "2.9195 min: 2.9177"
    glued = match[2][:1].isalpha() and unit not in UNITS and unit not in PER_STEP and unit != "x"
    hardware = unit == "x" and re.match(r" ?[A-Z]", match.string[match.end():match.end() + 2])  # 8 x NVIDIA H100
    if glued or hardware or after in ("_", "²") or after.isdigit():
        return None
    return as_number(digits, unit)


def as_number(text, unit):
    """Number of digits and a unit; None for a version (1.2.3), or if it is too large."""
    mantissa, _, exponent = text.replace(",", "").lower().partition("e")
    try:
        value = float(text.replace(",", ""))
        digit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    except (ValueError, OverflowError):
        return None
    return Number(value, digit, unit, text) if abs(value) < 1e15 and digit < 1e15 else None


@lru_cache(2048)
def kind_of(name):
    """The kind of number that the name of a column or row announces, "" if none; brackets do not count."""
    name = re.sub(r"\([^()]{0,200}\)", " ", name)  # "baseline (n=10)" is no n
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), "")


@lru_cache(2048)
def statistic_of(name):
    """The statistic that the name of a column or row announces."""
    if re.search(r"\+/-|±$", name):
        return "difference" if "+/-" in name else "spread"
    signs = [statistic for sign, statistic in SIGNS.items() if sign in name]
    found = [statistic for statistic, pattern in STATISTICS.items() if pattern.search(name)]
    return "interval" if "interval" in found else next(iter(signs + found), "")


@lru_cache(2048)
def label_statistic(label):
    """The statistic of a row that is called so and no more: "mean", not "h3-subtract-mean"."""
    name = statistic_of(label)
    rest = STATISTICS[name].sub(" ", label) if name in STATISTICS else label.strip("σμΔ ")
    return "" if re.search(r"\w", rest) else name


@lru_cache(2048)
def unit_of(name):
    """Seconds of the unit that a column or row names."""
    found = re.search(r"(?<![A-Za-z])(ms|s|sec|seconds|minutes)(?![A-Za-z])|\((min)\)", name)
    return UNITS[found[1] or found[2]] if found else None


def within(value, span):
    return span[0] <= value <= span[1]


def claim_of(number, kind, statistic, unit=None):
    """Claim of a number of that kind; its own unit comes first. None without a kind."""
    if number.unit in ("%", "x"):
        return Claim("percent", "difference", f"{number.text} {number.unit}", number.value, number.digit)
    own = PER_STEP.get(number.unit, number.unit)
    kind = "step time" if number.unit in PER_STEP else kind
    kind = kind if own not in UNITS or kind in ("time", "step time") else "time"
    if not kind:
        return None
    scale = (UNITS.get(own) or unit or 1) if kind in ("time", "step time") else 1
    text = f"{number.text} {own}" if own in UNITS else number.text
    return Claim(kind, statistic, text, number.value * scale, number.digit * scale)


# -- sentences

NAMED = re.compile(r"(?<![\w-])(?P<name>p|n|t|z)(?:[- ]?(?:values?|stat(?:istic)?))?(?:\s?\([^()]{0,40}\))?"
                   r"\s{0,3}(?P<relation>=|<=?|>=?|≤|≥|~|≈|:|of|is)\s{0,3}$", re.I)
CALLED = re.compile(r"(?<![\w-])(?:(?P<p>p-?val(?:ue)?s?|(?:one|two)-sided p)|t-?stat(?:istic)?)(?![\w-])"
                    r"[\w\s.,<>()-]{0,60}(?P<relation>[=:])\s{0,3}$", re.I)
RELATION = re.compile(r"(=|<=?|(?<!-)>=?|≤|≥|~|≈|\babout|\baround|\broughly|\bapprox\w*\.?|\bnearly|\balmost|\bbelow|"
                      r"\bunder|\bbeneath)\s{0,3}$", re.I)
RELATIONS = {"": "=", "=": "=", ":": "=", "of": "=", "is": "=", "<": "<", "<=": "<", "≤": "<", "below": "<",
             "under": "<", "beneath": "<", ">": ">", ">=": ">", "≥": ">"}
RUNS = re.compile(r"^\s?(?:\w+ ){0,2}?(?:runs|trials|seeds|logs|times)\b", re.I)
STEPS = re.compile(r"^\s?-?(?:\w+ )?(?:steps?|iterations|iters)\b(?!/)", re.I)
STEPS_ARE = re.compile(r"(?:^\W*|[,;|(.] ?)(?:(?:total |training )?steps|(?:total )?number of steps) ?[:=] ?$", re.I)
LABELED = re.compile(r"\W*(?:(?:final|mean|average|total|best|training|train|val|validation|test|overall)[ _-])*"
                     r"(?:loss|time|steps|runtime) ?: ?[~≈]? ?", re.I)  # a line that begins so is a claim of its own
EVERY_RUN = re.compile(r"(?<!\bnot )\b(?:all|every|each)\b(?: (?:of|the|my|our|these|single)\b){0,3} ?(\d{1,4}|\w*) ?"
                       r"\b(?:runs?|seeds?|trials?|logs?)\b[^.;,]{0,40}$", re.I)
ASIDE = re.compile(r"\s?-?[A-Za-z]{0,8}(\s?\([~≈+-]?[\d.]{1,12} ?%\))")  # 2.68 seconds (3.2%) faster
INTO = re.compile(r"\s?\w{0,7} ?(?:to|->|→) ?[~≈]?$")  # between the ends of a change
EVERY = re.compile(r"\b(?:every|each|first|last|next|within|per|at|on|by|around|about|once|over|warm-?up(?: of)?)"
                   r"\W{0,3}$", re.I)
LINK = re.compile(r"\s{0,3}(?:,|/|and|or|vs\.?|->|→|to|against|versus|\()?\s{0,3}", re.I)
VERSUS = re.compile(r"\s?\w{0,3} (?:vs\.?|instead of) [~≈]?(?:\d|$)")  # after the own number
ARROW = re.compile(r"\s?\w{0,3} ?(?:->|→) ?[~≈]?$")  # before it
AFTER = re.compile(r"^(?!\s?(?:with|and|but|while)\b)[\s\w]{0,12}\b"
                   r"(?:on average|(?:mean|avg|average|median|std|sd)\b(?! ?[:=]))", re.I)
LISTED = re.compile(r"\S{0,12}:? ?\[list\]|\s?(?:ms|s|sec)?\s?±")  # a mean stands before its list or its ±
CHANGE = re.compile(r"^\s?(?:\w+ ){0,2}?(?:mean |of |the )?(?:improvement|faster|slower|speed-?up|saving|fewer|less|"
                    r"overhead|longer|shorter|reduction|decrease|increase|difference|gain|extra|slow-?down)", re.I)
PERCENT = re.compile(r"(?:faster|slower|speed-?up|improve\w*|reduc\w*|gain\w*|sav\w+)\W+(?:\w+\W+){0,3}%|"
                     r"%\W+(?:\w+\W+){0,2}(?:faster|slower|speed-?up|improvement|less time|reduction|gain|better|"
                     r"of (?:its|the) time)", re.I)
UNIT_WORD = re.compile(r"^[\s-]?(?:ms|s|secs?|seconds?|mins?|minutes?)\b")
MEAN_NEXT = re.compile(r"\W{0,3}(?:mean|avg|average)\W{0,4}$", re.I)
A_STEP = re.compile(r"/ ?step|\bper[ -]step|\ba step|\bsteps? (?:times?|avg)", re.I)
TIME_IS = re.compile(r"(?:time|times|runtime)\)?s? ?(?:is|was|of|=|:|\()*[^\w]{0,4}(?:\w+ ?= ?)?$", re.I)
RECORD = re.compile(r"\bthis[ _](?:pr|record|run|submission|attempt|change)|\bnew[ _](?:record|wr|run)|\bours?\b"
                    r"|\bmine\b|candidate|\bmy changes\b|\bPR of\b", re.I)
RESULT = re.compile(RECORD.pattern + r"|\bfinal (?:val\w* |test )?loss|\bresult(?:s|ed|ing) in|\breach\w*|\bachiev\w*|"
                    r"\battain\w*", re.I)
ON_HARDWARE = re.compile(r"\s?(?:minutes|seconds|mins?|s)? on (?:an? )?\d+ ?x ?[A-Z]\d00", re.I)
COMPARED = re.compile(r"\b(?:vs\.?|versus|than|over|against|from|relative to|compared (?:to|with)|on top of|"
                      r"improvement over|better than|to)\s+(?:the |our |its )?[\w#-]{0,40}(?: \w{1,20})?", re.I)
OWNER = re.compile(r"\s?[a-z]{0,8} (?:of|for|from|by|in) (?:the |our |its )?[\w-]{1,40}(?: [a-z]{1,20})?")


def sentence_claims(text, ranges, heading=False):
    """Claims of a sentence, or of a line of code."""
    found, end, last, waiting = [], 0, None, None
    matches = [(match, number) for match in NUMBER.finditer(text) if (number := number_of(match))]
    starts = [match.start() for match, _ in matches[1:]] + [len(text)]
    for (match, number), until in zip(matches, starts, strict=False):
        at, own = match.start(), match.end(1)
        place = Place(number, text[max(end, at - 90):at], words_after(text, own, until), text[max(0, at - 120):at],
                      last, ranges)
        claim = claim_at(place)
        last = last if claim and claim.kind == "n" and last else claim  # "3.2788 (6 runs), std 0.0009"
        if waiting and claim and claim.kind in ("loss", "time") and MEAN_NEXT.match(place.before):
            found.append(replace(waiting, kind=claim.kind, at=at))  # "(std=0.0013, mean=3.2777)"
        waiting, end = None if claim else deviation_at(place), own
        found += [described(claim, place, text, at, heading)] if claim else []
        if claim and len(found) > 1 and INTO.fullmatch(text[found[-2].at + len(found[-2].text.split()[0]):at]):
            mark_change(*found[-2:])
    return found


def words_after(text, own, until):
    """The words after a number that ends at `own`, until the next one; a percentage in brackets is passed over."""
    aside = ASIDE.match(text, own)
    if not aside:
        return text[own:min(until, own + 60)]
    rest = re.split(r"\d", text[aside.end():aside.end() + 60], maxsplit=1)[0]
    return text[own:aside.start(1)] + rest


def mark_change(old, new):
    """Two claims of "84.9 s to 82.3 s": what it was and what it is now. A range is written the other way round."""
    alike = old.kind == new.kind and old.kind in ("loss", "time") and old.value > new.value
    if alike and {old.statistic, new.statistic} <= {"", "difference", "result", "mean"}:
        old.change, new.change = "from", "to"
        new.statistic, new.sure = "mean" if "mean" in (old.statistic, new.statistic) else "result", True
        old.statistic, old.sure = new.statistic if old.statistic else "", old.sure or bool(old.statistic)


def described(claim, place, text, at, heading):
    """A claim with the words that say whose it is; a result of this record if they say no more."""
    compared = COMPARED.sub(" ", text[max(0, at - 400):at])
    claim.subject = compared + (OWNER.match(place.after) or [""])[0]
    claim.around, claim.at = place.before[-40:] + place.after[:25], at
    own = heading or RESULT.search(place.before[-50:]) or ON_HARDWARE.match(place.after)
    own = own or LABELED.fullmatch(place.reach)
    if own and claim.kind in ("time", "loss") and not claim.statistic:
        claim.statistic, claim.sure = "result", True
    return claim


def deviation_at(place):
    """Claim of a standard deviation whose kind the next number tells; None if it is none."""
    number = place.number
    if number.digit < 1 and statistic_at(place) == "sd":
        return Claim("", "sd", number.text, number.value, number.digit, sure=True)
    return None


def claim_at(place):
    """The claim that a number in a sentence is by the words around it; None if it is about no result."""
    number = place.number
    if number.unit in ("%", "x"):
        said = PERCENT.search(f"{place.before[-40:]} % {place.after[:30]}")
        return claim_of(number, "", "") if said else None
    if place.last and place.before.rstrip().endswith("±"):
        return spread_claim(number, place.last)
    if named := NAMED.search(place.reach) or CALLED.search(place.reach):
        return named_claim(number, named, place.reach)
    if number.digit == 1 and number.text.isdigit() and RUNS.match(place.after):
        return runs_claim(place)
    if number.digit == 1 and STEPS.match(place.after) and not EVERY.search(place.before):
        return steps_claim(place)
    return measured_claim(place)


def spread_claim(number, last):
    """What stands after ±, in the unit of the number before it unless it has one."""
    claim = claim_of(number, last.kind, "spread")
    if claim and number.unit not in UNITS and last.kind in ("time", "step time"):
        scale = UNITS.get(last.text.split()[-1], 1)
        claim.value, claim.digit = claim.value * scale, claim.digit * scale
    return claim and replace(claim, sure=True)


def named_claim(number, named, before):
    """The claim p = x, n = x or t = x."""
    found = named.groupdict()
    kind = found["name"].lower().replace("z", "t") if "name" in found else "p" if found["p"] else "t"
    if kind == "p" and not 0 <= number.value <= 1:
        return None
    about = next((kind for kind in ("time", "loss") if KINDS[kind].search(before[-60:])), "")
    relation = RELATIONS.get(found["relation"].lower(), "~")
    return Claim(kind, "", number.text, number.value, number.digit, relation, about, sure=True)


def relation_before(text):
    """How a number is related to the truth by the word before it: =, <, >, or ~."""
    found = RELATION.search(text[-20:])
    return RELATIONS.get(found[1].lower() if found else "", "~")


def runs_claim(place):
    """The claim `5 runs`."""
    statistic = "difference" if re.search(r"\b(?:more|extra|additional)\b", place.after[:30]) else ""
    number = place.number
    return Claim("n", statistic, number.text, number.value, number.digit, relation_before(place.before))


def steps_claim(place):
    """The claim `1480 steps`, sure where they are all of a run."""
    change, number = statistic_at(place) == "difference", place.number
    total = re.search(r"\bin\s*$", place.before, re.I) or re.match(r"\W?(?:total|training)", place.after, re.I)
    return Claim("steps", "difference" if change else "", number.text, number.value, number.digit,
                 relation_before(place.before), sure=bool(total) and not change)


def measured_claim(place):
    """The claim of a loss or a time; None if the number is neither. What links it to the last one is said of both."""
    number, last = place.number, place.last
    statistic, kind = measured_statistic(place), kind_at(place)
    last = last if last and last.kind in ("loss", "time", "step time", "steps") else None
    if last and LINK.fullmatch(place.before):
        alike = not kind and number.unit not in UNITS and number.digit < 1
        statistic = last.statistic if alike or (not statistic and last.kind == kind) else statistic
        kind = last.kind if alike else kind
    if not kind and last and statistic in SINGLE and number.digit < 1 and len(place.before) < 40:
        kind = last.kind if last.kind != "steps" else ""  # "time: mean 70.2, median 70.1"
    if not kind and last and last.kind == "loss" and statistic == "difference" and number.digit <= 0.01 > number.value:
        kind = "loss" if re.search(r"\bby\s$", place.before[-40:]) else ""  # "3.2769 before: it falls by 0.0031"
    claim = claim_of(number, kind, statistic)
    if claim:
        claim.relation = relation_before(place.before)
        claim.sure = statistic not in ("", "difference") or kind == "steps" and all_steps(place)
        of_every_run(claim, place.reach)
    return claim


def of_every_run(claim, before):
    """Make "all 8 runs are under 81.3 s" a claim of the slowest one."""
    every = EVERY_RUN.search(before)
    if every and claim.relation in "<>" and claim.statistic in ("", "result") and claim.kind in ("loss", "time") and \
            not STATISTICS["mean"].search(before):
        claim.statistic, claim.sure = "max" if claim.relation == "<" else "min", True
        claim.every = int(every[1]) if every[1].isdigit() else 0


def measured_statistic(place):
    """The statistic of a loss or a time. One as large as those of the runs is no difference without a sign."""
    number, statistic = place.number, statistic_at(place)
    scale = UNITS.get(number.unit, 1)
    whole = number.digit * scale < 1 and any(within(number.value * scale, span) for span in place.ranges.values())
    if statistic == "difference" and whole and number.text[0] not in "+-":  # "improves the loss (3.2780 vs 3.2783)"
        statistic = ""
    own = VERSUS.match(place.after) or (place.last and ARROW.match(place.before))
    return statistic or ("result" if own else "")


def statistic_at(place):
    """The statistic that the words around a number say: the last one before it, or what stands after it."""
    before = place.before
    hits = [(m.start(), name) for name, pattern in STATISTICS.items() for m in pattern.finditer(before)]
    hits += [(at, name) for sign, name in SIGNS.items() if (at := before.rfind(sign)) >= 0]
    signed = place.number.text[0] in "+-"
    if signed or "difference" in {name for _, name in hits} or CHANGE.match(UNIT_WORD.sub("", place.after)):
        return "difference"
    if hits:
        return max(hits)[1]
    if LISTED.match(place.after):
        return "mean"
    found = AFTER.match(place.after)
    return (statistic_of(found[0]) or "mean") if found else ""


def kind_at(place):
    """The kind of a number in a sentence: by its unit, its digits, or the last word before it."""
    number, before = place.number, place.before
    if number.unit in UNITS or number.unit in PER_STEP:
        return "step time" if A_STEP.search(before[-40:] + place.after[:25]) else "time"
    fine = 1e-2 if EVERY_RUN.search(place.reach) else 1e-3  # "all runs are below 3.28"
    if number.digit <= fine and within(abs(number.value), place.ranges["loss"]):
        return "loss"
    alone = re.fullmatch(r"\W*(?:mean = )?", before) and not place.after.strip()  # "# 163.8384"
    if alone and number.digit <= 0.1 and within(number.value, place.ranges["time"]):
        return "time"
    hits = [(m.end(), kind) for kind in ("loss", "time", "step time", "steps")
            for m in KINDS[kind].finditer(before[-60:])]
    return kind_by_word(place, max(hits)[1] if hits else "")


def kind_by_word(place, kind):
    """The kind that the last word before a number says, if the number may be one: "" else."""
    number, before = place.number, place.before
    low, high = place.ranges["loss"]
    mean = STATISTICS["mean"].search(before[-30:])
    if kind == "steps":
        counted = re.search(r"steps?[:=]? ?$", before, re.I) and place.after[:1] in ("/", ":")
        return kind if (counted or all_steps(place)) and number.digit == 1 else ""
    if kind == "loss":
        wide = 20 if re.search(r"loss\w*\W{0,4}(?:\w+\W+){0,2}$", before, re.I) else 3
        fits = number.digit < 1 and low / wide <= number.value <= wide * high
        return kind if fits or (number.digit < 0.01 and number.value < 1) else ""
    if not kind:
        return "loss" if mean and number.digit <= 0.01 and low / 2 <= number.value <= 2 * high else ""
    called = mean or TIME_IS.search(before) or STATISTICS["sd"].search(before)
    return kind if called and number.digit < 1 else ""


def all_steps(place):
    """Whether a number of steps is that of a run: step 1480/1480, or "Steps: 1480" at the begin of a clause."""
    return place.after[:1] == "/" or STEPS_ARE.search(place.reach) and not place.after.lstrip().startswith("+")


# -- cells of tables


def cell_claims(label, name, cell, ranges, summary):
    """Claims of a cell of a table by the names of its row and column; `summary`: its rows are of groups."""
    if len(re.findall(r"[A-Za-z]{2,}", cell)) > 4:  # a sentence in a cell
        return sentence_claims(cell, ranges)
    own = kind_of(name)
    statistic = statistic_of(name) or (label_statistic(label) if own else statistic_of(label))
    kind, unit = own or kind_of(label), unit_of(name) or unit_of(label)
    matches = [(match, number) for match in NUMBER.finditer(cell) if (number := number_of(match))][:4]
    found = [cell_claim(number, cell[:match.start()], kind, statistic, unit) for match, number in matches]
    found = [claim for claim in found if claim]
    for claim in found:
        if claim.sure:
            claim.scope = ("words", "cell", label[:40])
        else:
            claim.about = "time" if KINDS["time"].search(f"{name} {label}") else "loss"
        claim.sure, claim.around = True, f"{name} {label}"
        if summary and not claim.statistic and claim.kind in ("loss", "time", "step time"):
            claim.statistic = "mean"
    return found


def cell_claim(number, before, kind, statistic, unit):
    """Claim of a number in a cell; `sure` if the cell itself says what it is."""
    if named := NAMED.search(before[-60:]):
        return named_claim(number, named, before)
    statistic = "spread" if before.rstrip().endswith("±") else statistic
    claim = claim_of(number, kind, statistic, unit)
    if claim and claim.kind in COUNTED and statistic != "difference":
        claim.statistic = ""
    return claim and replace(claim, relation=relation_before(before))
