# SPDX-License-Identifier: Apache-2.0
"""Renders the page: HTML that loads and runs nothing, light or dark as the reader's system is.

Every text passes `shown` and Jinja's escaping: names and reasons come from files that anybody may have written.
"""

from __future__ import annotations

import datetime

from layerwise_dist.errors import UnsupportedError, shown
from layerwise_dist.report.charts import charts
from layerwise_dist.report.facts import Event, Facts
from layerwise_dist.telemetry.figures import median, percentile
from layerwise_dist.telemetry.names import PARTS
from layerwise_dist.units import size

_LISTED = 100
_RANKS = 20
_TEXT = 1000

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Checkpoints of {{ directory }}</title>
<style>
:root { color-scheme: light dark; --ground: #fdfdfc; --card: #ffffff; --ink: #1d2329; --soft: #69737d;
  --line: #dfe3e6; --first: #1f6feb; --second: #9a6700; --bad: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --card: #1c2024; --ink: #e4e8ec; --soft: #98a2ac;
  --line: #333a41; --first: #6cb0ff; --second: #e0a63a; --bad: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.25rem 1rem 3rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 .5rem; }
p { margin: 0 0 .75rem; }
.soft { color: var(--soft); }
.bad { color: var(--bad); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 1rem 0; padding: 0; }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .75rem; }
.figures dt { color: var(--soft); font-size: .85rem; }
.figures dd { margin: 0; font-size: 1.15rem; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem;
  align-items: start; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .9rem 1rem;
  min-width: 0; }
section.wide { grid-column: 1 / -1; }
svg { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .75rem .3rem 0; border-top: 1px solid var(--line); }
th { font-weight: 600; border-top: 0; white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.text { overflow-wrap: anywhere; min-width: 10rem; }
td.when { white-space: nowrap; }
@media (max-width: 40rem) {
  .stack tr { display: block; border-top: 1px solid var(--line); padding: .4rem 0; }
  .stack tr:first-child { display: none; }
  .stack td { display: block; border: 0; padding: 0; }
  .stack td.number { text-align: left; }
  .stack td.number::before { content: "step "; }
}
</style>
</head>
<body>
<h1>Checkpoints of {{ directory }}</h1>
<p class="soft">Made {{ made }}.{% if run %} {{ run }}{% endif %}{% if cut %} {{ cut }}.{% endif %}</p>
<dl class="figures">
{% for name, value in figures %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}</dl>
<div class="grid">
{% for name, title, text in panels if charts[name] %}<section>
<h2>{{ title }}</h2>
{{ charts[name] | safe }}
{% if text %}<p class="soft">{{ text }}</p>{% endif %}
</section>
{% endfor %}{% if ranks %}<section>
<h2>Slowest rank</h2>
<p>{{ slowest }}</p>
<div class="scroll"><table>
<tr>{% for name in ("rank", "was last", "write", "GB/s", "stall") %}<th class="number">{{ name }}</th>{% endfor %}</tr>
{% for row in ranks %}<tr>{% for cell in row %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<p class="soft">Medians of committed checkpoints.
{% if more_ranks %}{{ more_ranks }} more ranks are left out.{% endif %}</p>
</section>
{% endif %}<section class="wide">
<h2>Failures</h2>
{% if failures %}<div class="scroll"><table class="stack">
<tr><th>when</th><th class="number">step</th><th>what</th><th>why</th></tr>
{% for when, step, what, why in failures %}
<tr><td class="when">{{ when }}</td><td class="number">{{ step }}</td>
<td{% if what != "skipped" %} class="bad"{% endif %}>{{ what }}</td><td class="text">{{ why }}</td></tr>
{% endfor %}</table></div>
{% if more_failures %}<p class="soft">{{ more_failures }} older ones are left out.</p>{% endif %}
{% else %}<p>{{ no_failures }}</p>{% endif %}
</section>
{% if commits %}<section class="wide">
<h2>Checkpoints in the directory</h2>
<div class="scroll"><table>
<tr><th class="number">step</th><th>status</th><th class="number">size</th><th>committed</th><th>tag</th></tr>
{% for row in commits %}
<tr><td class="number">{{ row[0] }}</td><td>{{ row[1] }}</td><td class="number">{{ row[2] }}</td>
<td class="when">{{ row[3] }}</td>
<td class="text">{{ row[4] }}</td></tr>
{% endfor %}</table></div>
{% for line in branches %}<p class="soft">{{ line }}</p>
{% endfor %}</section>
{% endif %}{% if problems %}<section class="wide">
<h2>Damage</h2>
{% for line in problems %}<p class="bad">{{ line }}</p>
{% endfor %}</section>
{% endif %}</div>
</body>
</html>
"""


def render(facts: Facts) -> str:
    """The page. Raises UnsupportedError without matplotlib or Jinja."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise UnsupportedError(f"a report needs Jinja: pip install 'layerwise_dist[report]' ({error})") from error
    drawn = charts(facts)
    ranks = facts.ranks
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(_PAGE)
    return page.render(
        directory=_text(facts.directory), made=_when(facts.made), run=_run(facts), cut=facts.cut,
        figures=_figures(facts),
        charts={name: drawn.get(name) for name, *_ in _panels(facts)}, panels=_panels(facts),
        slowest=_slowest(facts), more_ranks=max(0, len(ranks) - _RANKS),
        ranks=[
            (each.rank, each.last or "-", _seconds(each.write_s), _three(each.gb_per_s), _seconds(each.stall_s))
            for each in ranks[:_RANKS]
        ],
        failures=[_failure(event) for event in facts.bad[:_LISTED]],
        more_failures=max(0, len(facts.bad) - _LISTED),
        no_failures="None is known." if facts.checkpoints else "There are no events: set telemetry.events in the job.",
        commits=[
            (each.step, each.status, size(each.nbytes), _when(each.created), _text(each.tag or ""))
            for each in sorted(facts.commits, reverse=True)[:_LISTED]
        ],
        branches=[
            f"seq {each.seq}: {'started anew' if each.parent is None else f'rolled back to seq {each.parent}'}"
            for each in facts.branches[-_LISTED:]
        ],
        problems=[_text(each) for each in facts.problems[:_LISTED]],
    )  # fmt: skip


def _panels(facts: Facts) -> list[tuple[str, str, str]]:
    parts = ", ".join(f"{part} {_seconds(facts.stall_parts_s[part])}" for part in PARTS)
    stalls = f"For each checkpoint, the longest on any rank. Total on one rank: {parts}."
    return [
        ("timeline", "Steps and checkpoints", ""),
        ("stalls", "Stall", stalls),
        ("throughput", "Throughput", "Of each rank's shard, from the capture's beginning until it was durable."),
        ("lineage", "Lineage", "Commits that are in the directory, by branch."),
        ("layers", "Bytes by layer", "Of the newest checkpoint: parameters with their optimizer state."),
    ]


def _figures(facts: Facts) -> list[tuple[str, str]]:
    """The cards at the top."""
    newest = next((each for each in facts.commits if each.status == "newest"), None)
    found = [("newest commit", f"step {newest.step}" if newest else "none")]
    if newest is not None:
        found.append(("checkpoint", size(newest.nbytes)))
    found += [(name, str(facts.outcomes[name])) for name in ("committed", "failed", "skipped") if facts.checkpoints]
    if facts.stalls_ms:
        middle, high = median(facts.stalls_ms), percentile(facts.stalls_ms, 99)
        assert middle is not None and high is not None
        found += [("stall, median", _seconds(middle / 1e3)), ("stall, p99", _seconds(high / 1e3))]
    took = median([event["committed_s"] for event in facts.committed if event["committed_s"] is not None])
    if took is not None:
        found.append(("until committed", _seconds(took)))
    return found


def _run(facts: Facts) -> str:
    if not facts.starts:
        return ""
    last = facts.starts[-1]
    ranks = f"{last['world_size']:.0f} ranks" if last["world_size"] is not None else "an unknown number of ranks"
    return _text(f"{len(facts.starts)} starts; the last on {ranks}, {last['framework'] or '?'}, mode {last['mode']}.")


def _slowest(facts: Facts) -> str:
    known = [event for event in facts.committed if event["slowest_rank"] is not None]
    if not known or not facts.ranks or not facts.ranks[0].last:
        return "Which rank was last is not known: rank 0's events tell it, in mode direct."
    first = facts.ranks[0]
    behind = median([e["slowest_behind_s"] for e in known if e["slowest_behind_s"] is not None])
    return (
        f"Rank {first.rank} was last in {first.last} of {len(known)} checkpoints; the last is "
        f"{_seconds(behind)} after the first (median)."
    )


def _failure(event: Event) -> tuple[str, str, str, str]:
    what = event.get("outcome") or "checkpoints stopped"
    step = event.get("step")
    return _when(event["time"]), "-" if step is None else str(step), what, _text(event["reason"] or "not told")


def _text(text: str) -> str:
    return shown(text, _TEXT)


def _when(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s" if value < 600 else f"{value / 60:.3g} min"
