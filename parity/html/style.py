"""The looks of the report: one style sheet, for light and dark, screen and paper.

Colour never speaks alone: every cell holds its own text. The ramp of distances goes from light to dark in one
direction, so that it also reads in grey."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f7f7f5; --card: #ffffff; --ink: #1d2125; --soft: #5b6470; --line: #dcdfe3; --code: #eef0f2;
  --good: #0b6b53; --good-back: #e0f2ec; --bad: #a3182c; --bad-back: #fbe6e8; --link: #1f4fa3;
  --same: #e3efeb; --same-ink: #2d6657; --mark: #ffe08a; --mark-ink: #3b2c00; --bar: #b5452c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1d2125; --ink: #e6e8ea; --soft: #a3abb5; --line: #343a41; --code: #2a2f35;
    --good: #7fdcc0; --good-back: #11352b; --bad: #ff9aa5; --bad-back: #45161d; --link: #9cc0ff;
    --same: #1c332d; --same-ink: #8fc7b7; --mark: #6b5200; --mark-ink: #fff3cf; --bar: #e8835f;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
main:has(table.many) { max-width: 1700px; }
h1 { font-size: 21px; margin: 0 0 14px; font-weight: 650; }
h2 { font-size: 16px; margin: 0 0 12px; font-weight: 650; }
h3 { font-size: 14px; margin: 18px 0 6px; font-weight: 650; }
p { margin: 0 0 10px; }
a { color: var(--link); }
code, .mono, td.n { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 12.5px; }
code { overflow-wrap: anywhere; }
section, .banner { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 18px 20px;
  margin: 0 0 16px; }
.banner { border-left: 6px solid; }
.banner.yes { border-left-color: var(--good); background: var(--good-back); }
.banner.no { border-left-color: var(--bad); background: var(--bad-back); }
.banner strong { display: block; font-size: 24px; line-height: 1.25; }
.banner.yes strong { color: var(--good); }
.banner.no strong { color: var(--bad); }
.banner p { margin: 6px 0 0; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: 10px 34px; margin: 0; }
.tiles div { min-width: 90px; }
.tiles dt { color: var(--soft); font-size: 12.5px; }
.tiles dd { margin: 0; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; padding-bottom: 4px; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: 4px 10px 4px 0; vertical-align: top; }
table.rows { width: 100%; font-size: 12.5px; }
table.rows th { color: var(--soft); font-weight: 500; white-space: nowrap; }
table.rows td, table.rows th { border-bottom: 1px solid var(--line); }
table.rows td.n, table.rows th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
table.rows td.wrap { min-width: 240px; overflow-wrap: anywhere; }
table.rows tr:target td { background: var(--mark); color: var(--mark-ink); }
details { margin-top: 10px; }
summary { cursor: pointer; color: var(--link); }
.notes { margin: 12px 0 0; padding-left: 20px; }
.apart { background: var(--mark); color: var(--mark-ink); border-radius: 3px; padding: 0 3px; }

table.heat { border-collapse: separate; border-spacing: 2px; font-size: 11.5px; }
table.heat th { font-weight: 500; color: var(--soft); padding: 0 6px; white-space: nowrap; }
table.heat thead th:first-child { text-align: right; }
table.heat thead th { text-align: center; padding: 0 2px 3px; }
table.heat tbody th { text-align: right; vertical-align: middle; position: sticky; left: 0;
  background: var(--card); color: var(--ink); }
table.heat td { padding: 0; text-align: center; min-width: 34px; height: 20px; line-height: 20px; border-radius: 3px;
  font-variant-numeric: tabular-nums; white-space: nowrap; vertical-align: middle; }
table.heat.few td { min-width: 62px; }
table.heat.many { border-spacing: 1px; font-size: 9.5px; }
table.heat.many td { min-width: 29px; }
table.heat.many tbody th { font-size: 11px; }
table.heat td a { color: inherit; text-decoration: none; display: block; }
table.heat td.first { outline: 2px solid var(--ink); outline-offset: 1px; font-weight: 700; }
sup { font-size: 0.75em; line-height: 0; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 14px; margin: 12px 0 0; padding: 0; list-style: none;
  font-size: 12.5px; color: var(--soft); }
.legend span { display: inline-block; min-width: 34px; text-align: center; border-radius: 3px; padding: 0 5px;
  margin-right: 5px; font-size: 11.5px; line-height: 20px; }
.u0 { background: var(--same); color: var(--same-ink); }
.u1 { background: #fff2bf; color: #3d2f00; }
.u2 { background: #fdd985; color: #3d2600; }
.u3 { background: #f9ae59; color: #351c00; }
.u4 { background: #ee7f45; color: #2a0d00; }
.u5 { background: #c43f2e; color: #ffffff; }
.u6 { background: #952450; color: #ffffff; }
.u7 { background: #581150; color: #ffffff; }
.tol { background: #cfe3f7; color: #123a63; }
.nan { background: #000000; color: #ffffff; box-shadow: inset 0 0 0 1px #8a8f96; }
.ids { background: #2b57a8; color: #ffffff; }
.none { background: repeating-linear-gradient(135deg, transparent 0 4px, var(--line) 4px 6px); color: var(--ink);
  box-shadow: inset 0 0 0 1px var(--soft); }

.pair { font-size: 13.5px; }
.pair th { color: var(--soft); font-weight: 500; padding: 1px 16px 1px 0; }
.pair td { padding: 1px 22px 1px 0; white-space: nowrap; }
.bits { letter-spacing: 0; white-space: nowrap; }
.bits i { font-style: normal; padding: 0 0.5px; }
.bits i.x { background: var(--mark); color: var(--mark-ink); font-weight: 700; text-decoration: underline; }
.bits .gap { padding-right: 7px; }
.side { display: flex; flex-wrap: wrap; gap: 26px 48px; align-items: flex-start; margin-top: 8px; }
.side > div { min-width: 0; max-width: 100%; }
.side h3 { margin-top: 8px; }
svg text { fill: var(--ink); font: 11px system-ui, sans-serif; }
svg .soft { fill: var(--soft); }
svg .bar { fill: var(--bar); }
svg .zero { fill: var(--same-ink); }
svg .dot { fill: var(--same-ink); }
svg .ring { fill: none; stroke: #2b6fd1; stroke-width: 2; }
svg .tri { fill: none; stroke: #d98200; stroke-width: 2; }
svg .box { fill: var(--bad); }
.ex { display: inline-block; min-width: 30px; padding: 0 5px; margin-right: 3px; text-align: right; border-radius: 3px;
  background: var(--code); }
.ex.gone, .ex.came { background: var(--mark); color: var(--mark-ink); font-weight: 700; }
.ex.moved { box-shadow: inset 0 0 0 1.5px #2b6fd1; }
.tag { white-space: nowrap; }
.tag.bad { color: var(--bad); font-weight: 650; }
dl.tree { margin: 0; display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; font-size: 13.5px; }
dl.tree dt { color: var(--soft); }
dl.tree dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
@media (max-width: 640px) { dl.tree { grid-template-columns: 1fr; } }
@media print { body { background: #ffffff; } section { break-inside: avoid; } }
"""
