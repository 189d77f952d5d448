"""The results as Markdown: what is right, then ours beside the fastest peer and the ceiling."""

from __future__ import annotations

PUBLISHED = {
    "NPUNsaCompressAttention S4096 N64/4 D128/128 bf16": 0.710e-3,
    "NPUNsaCompressAttention S16384 N64/4 D128/128 bf16": 4.970e-3,
    "NPUNsaCompressAttention S65536 N64/4 D128/128 bf16": 53.0e-3,
    "NPUNsaCompressAttention S4096 N64/4 D128/128 bf16 without selection": 0.218e-3,
    "NPUNsaCompressAttention S16384 N64/4 D128/128 bf16 without selection": 1.440e-3,
    "NPUNsaCompressAttention S65536 N64/4 D128/128 bf16 without selection": 16.1e-3,
}
"""Label -> seconds on an H100 of the Triton kernels in XunhaoLai/native-sparse-attention-triton, as
its README gives them: no library has the operator.
"""

_OURS = "opferry "


def render(target: str, seed: int, records: list[dict], missing: list[str]) -> str:
    """All tables."""
    parts = [f"# {target}, seed {seed}", *_modes(records), *_ceilings(records)]
    for group in dict.fromkeys(r["group"] for r in records if "problem" in r):
        parts += _group(group, [r for r in records if r.get("group") == group])
    if missing:
        parts += ["", "Not done: " + "; ".join(missing)]
    return "\n".join(parts) + "\n"


def all_right(records: list[dict]) -> bool:
    """Whether no mode and no configuration that was built gave a wrong result or crashed."""
    modes = all(r["ok"] is not False for r in records if "mode" in r)
    notes = (note for r in records if "problem" in r for note in r["notes"].items())
    return modes and not any(
        (name.startswith(_OURS) and not note.startswith("not built")) or name == "timing"
        for name, note in notes
    )


def _modes(records: list[dict]) -> list[str]:
    verdicts = [r for r in records if "mode" in r]
    if not verdicts:
        return []
    right = sum(r["ok"] is True for r in verdicts)
    blind = sum(r.get("poisoned") is False for r in verdicts)
    lines = ["", f"{right} of {len(verdicts)} modes are right, {blind} in memory without poison."]
    lines += [f"- WRONG {r['mode']}: {r['note']}" for r in verdicts if r["ok"] is False]
    refused: dict[str, int] = {}
    for r in verdicts:
        if r["ok"] is None:
            refused[r["note"]] = refused.get(r["note"], 0) + 1
    return lines + [f"- not built ({count}): {note}" for note, count in refused.items()]


def _ceilings(records: list[dict]) -> list[str]:
    measured = [r["ceilings"] for r in records if "ceilings" in r]
    if not measured:
        return []
    best = {name: max(rates[name] for rates in measured) for name in measured[0]}
    rates = [f"{name} {best[name] / 1e12:.0f} T/s" for name in ("int8", "fp16", "bf16")]
    return ["", f"Ceilings: copy {best['copy'] / 1e12:.2f} TB/s, {', '.join(rates)}."]


def _group(group: str, records: list[dict]) -> list[str]:
    lines = [
        "",
        f"## {group}",
        "",
        "| problem | ours, ms | configuration | default, ms | peer, ms | peer | peer / ours | "
        "of the ceiling |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(r) for r in records]
    notes = [f"- {r['problem']}, {n}: {note}" for r in records for n, note in r["notes"].items()]
    return lines + ["", *notes]


def _row(r: dict) -> str:
    medians = {name: time["median"] for name, time in r["times"].items()}
    ours = {name: t for name, t in medians.items() if name.startswith(_OURS)}
    others = {name: t for name, t in medians.items() if name not in ours}
    if not others and r["problem"] in PUBLISHED:
        others = {"published, H100": PUBLISHED[r["problem"]]}
    best = min(ours, key=ours.get, default=None)
    peer = min(others, key=others.get, default=None)
    cells = [
        _ms(ours.get(best)),
        "-" if best is None else best.removeprefix(_OURS),
        _ms(ours.get(_OURS + "default")),
        _ms(others.get(peer)),
        peer or "-",
        f"{others[peer] / ours[best]:.2f}" if best and peer else "-",
        f"{r['floor'] / ours[best]:.2f}" if best and r.get("floor") else "-",
    ]
    return f"| {r['problem']} | " + " | ".join(cells) + " |"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.4g}"
