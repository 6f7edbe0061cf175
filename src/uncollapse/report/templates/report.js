"use strict";
(() => {
  const tip = document.getElementById("tip");
  const NS = "http://www.w3.org/2000/svg";

  // Text goes in as text nodes only: names and tokens come from models.
  function show(parts, x, y) {
    tip.replaceChildren(...parts);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = x + 14 + box.width > innerWidth - 8 ? x - 14 - box.width : x + 14;
    const top = y + 16 + box.height > innerHeight - 8 ? y - 12 - box.height : y + 16;
    tip.style.transform = `translate(${Math.max(8, Math.min(left, innerWidth - box.width - 8))}px,${Math.max(8, top)}px)`;
  }
  const hide = () => { tip.hidden = true; };
  const bold = (text) => Object.assign(document.createElement("b"), { textContent: text });
  const fmt = (v) => String(Number(v.toPrecision(3))).replace("-", "\u2212");

  function nearest(values, wanted) {
    let best = 0;
    for (let i = 1; i < values.length; i++) if (Math.abs(values[i] - wanted) < Math.abs(values[best] - wanted)) best = i;
    return best;
  }

  for (const svg of document.querySelectorAll("svg[data-readout]")) {
    const panels = JSON.parse(svg.dataset.readout);
    if (!panels.length) continue;
    const marks = svg.appendChild(document.createElementNS(NS, "g"));
    const px = (p, x) => p.box[0] + (x - p.x[0]) / (p.x[1] - p.x[0]) * (p.box[2] - p.box[0]);
    const py = (p, y) => p.box[3] - (y - p.y[0]) / (p.y[1] - p.y[0]) * (p.box[3] - p.box[1]);
    const mark = (kind, attributes) => {
      const node = marks.appendChild(document.createElementNS(NS, kind));
      for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    };
    const dot = (p, line, i) => {
      mark("circle", { class: "dot", cx: px(p, line.x[i]), cy: py(p, line.y[i]), r: 4.5, style: `fill:var(--${line.colour})` });
      return Object.assign(document.createElement("i"), { style: `background:var(--${line.colour})` });
    };

    function overTime(p, x) {
      const wanted = p.x[0] + (x - p.box[0]) / (p.box[2] - p.box[0]) * (p.x[1] - p.x[0]);
      const first = p.lines[0];
      const at = first.x[nearest(first.x, wanted)];
      const parts = [bold((p.xname.startsWith("position") ? "position " : "step ") + fmt(at))];
      for (const other of panels) {
        if (other.nearest !== "x" || Math.abs(other.box[0] - p.box[0]) > 1) continue;
        mark("line", { class: "cross", x1: px(other, at), x2: px(other, at), y1: other.box[1], y2: other.box[3] });
        for (const line of other.lines) {
          const i = nearest(line.x, at);
          if (line.x[i] !== at) continue;
          const name = other.lines.length > 1 ? `${other.title}, ${line.name}` : other.title;
          parts.push("\n", dot(other, line, i), `${name} ${fmt(line.y[i])}`);
        }
      }
      return parts;
    }
    function inPlane(p, x, y) {
      let best = null;
      for (const line of p.lines) line.x.forEach((_, i) => {
        const d = Math.hypot(px(p, line.x[i]) - x, py(p, line.y[i]) - y);
        if (!best || d < best.d) best = { d, line, i };
      });
      if (!best || best.d > 40) return [];
      const { line, i } = best;
      return [dot(p, line, i), bold(line.name), `\nentropy ${fmt(line.x[i])} nats\nreward ${fmt(line.y[i])}`];
    }
    svg.addEventListener("pointermove", (event) => {
      marks.replaceChildren();
      const box = svg.getBoundingClientRect();
      const scale = svg.viewBox.baseVal.width / box.width;
      const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
      const p = panels.find((q) => x >= q.box[0] - 6 && x <= q.box[2] + 6 && y >= q.box[1] - 6 && y <= q.box[3] + 6);
      const parts = !p ? [] : p.nearest === "x" ? overTime(p, x) : inPlane(p, x, y);
      if (parts.length) show(parts, event.clientX, event.clientY); else hide();
    });
    svg.addEventListener("pointerleave", () => { marks.replaceChildren(); hide(); });
  }

  const numbers = (text) => text.split(",").map((v) => v === "" ? NaN : Number(v));
  const two = (v) => Number.isNaN(v) ? "unknown" : v.toFixed(2).replace("-", "\u2212");
  for (const probe of document.querySelectorAll(".probe")) {
    const answer = probe.querySelector(".answer");
    const steps = probe.dataset.steps.split(","), scale = Number(probe.dataset.scale);
    const tokens = [...answer.children].map((node) => {
      const told = node.title;
      node.removeAttribute("title"); // the tooltip below takes over
      if (!("h" in node.dataset)) return { node, told, colour: node.className }; // a prediction: nothing to replay
      return { node, h: numbers(node.dataset.h), p: numbers(node.dataset.p) };
    });
    let now = steps.length - 1;
    let active = -1;
    const describe = (t) => {
      if (t.told !== undefined) {
        const [first, ...rest] = t.told.split("\n");
        return [bold(first), ...rest.map((line) => `\n${line}`)];
      }
      const lines = [bold(`entropy ${two(t.h[0])} \u2192 ${two(t.h[now])} nats`)];
      if (!Number.isNaN(t.p[now])) lines.push(`\nlog-probability ${two(t.p[0])} \u2192 ${two(t.p[now])} nats`);
      lines.push(`\nstep ${steps[0]} \u2192 ${steps[now]}`);
      return lines;
    };
    function paint() {
      let before = 0, after = 0, known = 0;
      for (const t of tokens) {
        if (t.told !== undefined) {
          t.node.className = t.colour;
          continue;
        }
        const change = t.h[now] - t.h[0];
        const size = Number.isNaN(change) ? 0 : Math.min(4, Math.floor(Math.abs(change) / scale * 4 + 0.5));
        t.node.className = `tok k${change > 0 || !size ? size : -size}`;
        if (!Number.isNaN(change)) { before += t.h[0]; after += t.h[now]; known += 1; }
      }
      if (known) probe.querySelector(".after").textContent = `${two(before / known)} \u2192 ${two(after / known)} nats`;
      if (active >= 0) tokens[active].node.classList.add("on");
    }
    function walk(to) {
      active = Math.max(-1, Math.min(to, tokens.length - 1));
      paint();
      if (active < 0) return hide();
      const box = tokens[active].node.getBoundingClientRect();
      show(describe(tokens[active]), box.left, box.bottom - 8);
    }
    answer.addEventListener("pointermove", (event) => {
      const found = tokens.find((t) => t.node === event.target);
      if (found) show(describe(found), event.clientX, event.clientY); else hide();
    });
    answer.addEventListener("pointerleave", hide);
    answer.addEventListener("blur", () => walk(-1));
    answer.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") walk(-1);
      if (!move) return;
      event.preventDefault();
      walk(Math.max(0, active + move));
    });
    const replay = probe.querySelector(".replay");
    if (steps.length > 2) {
      replay.hidden = false;
      replay.querySelector("input").addEventListener("input", (event) => {
        now = Number(event.target.value);
        replay.querySelector("output").textContent = steps[now];
        paint();
      });
    }
  }

  for (const button of document.querySelectorAll(".copy")) {
    const code = button.closest(".code").querySelector("pre");
    button.hidden = false;
    button.addEventListener("click", async () => {
      let done = true;
      try {
        await navigator.clipboard.writeText(code.textContent);
      } catch { // pages opened from disk may not write to the clipboard directly
        getSelection().selectAllChildren(code);
        done = document.execCommand("copy");
      }
      button.textContent = done ? "Copied" : "Press Ctrl+C";
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }

  const links = new Map([...document.querySelectorAll("nav li a")].map((a) => [a.hash.slice(1), a]));
  const seen = new Set();
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) entry.isIntersecting ? seen.add(entry.target.id) : seen.delete(entry.target.id);
    const current = [...links.keys()].find((id) => seen.has(id));
    for (const [id, link] of links) id === current ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
  }, { rootMargin: "-15% 0px -70% 0px" });
  for (const section of document.querySelectorAll("main section")) watcher.observe(section);

  addEventListener("beforeprint", () => { for (const d of document.querySelectorAll("details")) d.open = true; });
  addEventListener("scroll", hide, { passive: true });
})();
