"use strict";
(() => {
  const EVERY_MS = 2000;
  const live = () => document.getElementById("live");
  const fresh = document.getElementById("fresh");
  let tag = null;

  /* Times in the reader's own zone; the server cannot know it. */
  function localize(root) {
    for (const time of root.querySelectorAll("time")) {
      const at = new Date(time.dateTime);
      const today = at.toDateString() === new Date().toDateString();
      time.title = at.toLocaleString();
      time.textContent = today ? at.toLocaleTimeString() : at.toLocaleString();
    }
  }

  /* The first row that the reader sees stays where it is, whatever comes above it. */
  function keepingPlace(change) {
    const rows = [...document.querySelectorAll("[data-key]")];
    const anchor = window.scrollY > 0 ? rows.find((row) => row.getBoundingClientRect().bottom > 0) : undefined;
    const top = anchor && anchor.getBoundingClientRect().top;
    change();
    if (anchor && anchor.isConnected) window.scrollBy(0, anchor.getBoundingClientRect().top - top);
  }

  /* Rows that did not change stay the same elements, so focus and selection stay too. */
  function mergeRows(next) {
    const body = document.querySelector("#live > table tbody");
    const nextBody = next.querySelector("#live > table tbody");
    if (!body || !nextBody) return false;
    const known = new Map([...body.children].map((row) => [row.dataset.key, row]));
    const rows = [...nextBody.children].map((row) => {
      const old = known.get(row.dataset.key);
      return old && old.dataset.version === row.dataset.version ? old : row;
    });
    const kept = new Set(rows);
    for (const row of [...body.children]) if (!kept.has(row)) row.remove();
    rows.forEach((row, index) => {
      if (body.children[index] !== row) body.insertBefore(row, body.children[index] || null);
    });
    for (const part of [".summary", "nav"]) {
      const [old, now] = [live().querySelector(part), next.querySelector("#live " + part)];
      if (old && now) { if (old.innerHTML !== now.innerHTML) old.replaceWith(now); }
      else if (now) live().append(now);
      else if (old) old.remove();
    }
    return true;
  }

  function show(text) {
    const next = new DOMParser().parseFromString(text, "text/html");
    if (!next.getElementById("live")) return;
    localize(next);
    keepingPlace(() => {
      if (mergeRows(next)) return;
      const open = [...live().querySelectorAll("details")].map((each) => each.open);
      live().replaceWith(next.getElementById("live"));
      live().querySelectorAll("details").forEach((each, index) => { each.open = open[index] || false; });
    });
  }

  async function refresh() {
    const began = performance.now();
    try {
      const selecting = !window.getSelection().isCollapsed;
      if (document.visibilityState === "visible" && !selecting) {
        const answer = await fetch(location.href, { headers: tag ? { "if-none-match": tag } : {}, cache: "no-store" });
        if (answer.status === 200) {
          tag = answer.headers.get("etag");
          show(await answer.text());
        }
        fresh.textContent = "live";
      }
    } catch {
      fresh.textContent = "the sandbox does not answer";
    }
    setTimeout(refresh, Math.max(EVERY_MS, 10 * (performance.now() - began)));
  }

  const form = document.querySelector("form");
  if (form) {
    for (const select of form.querySelectorAll("select")) select.addEventListener("change", () => form.requestSubmit());
  }
  if (live()) {
    localize(document);
    setTimeout(refresh, EVERY_MS);
  }
})();
