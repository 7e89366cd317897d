(() => {
  "use strict";
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const cards = all(".card");
  const byId = new Map(cards.map((card) => [card.dataset.id, card]));
  const KEYS = { y: "yes", n: "no", u: "unsure" };

  // Labels live in this page; the browser keeps them between visits where it is allowed to.
  const STORE = "ditmill-labels-" + document.body.dataset.store;
  let kept = true;
  const labels = new Map();
  try {
    for (const [id, entry] of Object.entries(JSON.parse(localStorage.getItem(STORE) || "{}"))) labels.set(id, entry);
    localStorage.setItem(STORE, JSON.stringify(Object.fromEntries(labels)));
  } catch {
    kept = false;
  }
  const keep = () => {
    try {
      localStorage.setItem(STORE, JSON.stringify(Object.fromEntries(labels)));
    } catch {
      kept = false;
    }
    if (one("#unkept")) one("#unkept").hidden = kept;
  };

  const cell = (text) => {
    // a spreadsheet would run what starts like a formula
    const safe = /^[=+\-@\t\r]/.test(text) ? "'" + text : text;
    return /[",;\t\r\n]/.test(safe) ? '"' + safe.replaceAll('"', '""') + '"' : safe;
  };
  const csv = () => {
    const rows = [...labels].filter(([, entry]) => entry.label);
    const lines = rows.map(([id, entry]) => [id, entry.label, entry.note || ""].map(cell).join(","));
    return ["sample_id,label,note", ...lines].join("\r\n") + "\r\n";
  };

  const setLabel = (card, label) => {
    const id = card.dataset.id;
    const entry = labels.get(id) || {};
    entry.label = entry.label === label ? "" : label;
    if (entry.label || entry.note) labels.set(id, entry);
    else labels.delete(id);
    keep();
    paint(card);
    tell();
  };
  const paint = (card) => {
    const own = (labels.get(card.dataset.id) || {}).label || "";
    const given = card.dataset.given;
    const mark = one(".mark", card);
    mark.textContent = mark.dataset.says = own || given;
    mark.classList.toggle("given", !own && given !== "");
    const shown = closer.open && current === card ? all("button[data-set]", closer) : [];
    for (const button of [...all("button[data-set]", card), ...shown])
      button.setAttribute("aria-pressed", String(button.dataset.set === own));
  };
  const tell = () => {
    const here = cards.filter((card) => (labels.get(card.dataset.id) || {}).label);
    const sure = here.filter((card) => labels.get(card.dataset.id).label !== "unsure");
    const agreed = sure.filter((card) => (labels.get(card.dataset.id).label === "yes") === (card.dataset.verdict === "accepted"));
    one("#progress").value = here.length;
    one("#count").textContent = `${here.length} of ${cards.length} labelled`;
    one("#agree").textContent = sure.length ? ` · ${agreed.length} of ${sure.length} labels agree with the verdict` : "";
    one("#download").disabled = ![...labels.values()].some((entry) => entry.label);
  };

  // Only what is in view holds a decoder.
  let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  const start = (video) => {
    if (!video.getAttribute("src")) video.src = video.dataset.src;
    video.play().catch(() => {});
  };
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting && playing) start(target);
      else if (isIntersecting) {
        target.preload = "auto";
        if (!target.getAttribute("src")) target.src = target.dataset.src;
      } else if (target.getAttribute("src")) {
        target.pause();
        target.removeAttribute("src");
        target.load();
      }
    }
  }, { rootMargin: "120px" });
  all("video", one("#gallery")).forEach((video) => watcher.observe(video));
  const setPlaying = (on) => {
    playing = on;
    document.body.classList.toggle("still", !on);
    one("#play").setAttribute("aria-pressed", String(on));
    one("#play").textContent = on ? "Playing" : "Paused";
    for (const video of all("video[src]", one("#gallery"))) on ? start(video) : video.pause();
  };
  for (const type of ["mouseenter", "mouseleave"])
    document.addEventListener(type, ({ target }) => {
      const video = target.matches?.(".card") && one("video", target);
      if (video && !playing) type === "mouseenter" ? start(video) : video.pause();
    }, true);

  // What is shown, and in what order.
  const chosen = { verdict: "all", label: "", words: [] };
  const text = new Map(cards.map((card) => [card, (card.dataset.id + " " + card.textContent).toLowerCase()]));
  const matches = (card) => {
    const label = (labels.get(card.dataset.id) || {}).label || card.dataset.given;
    return (chosen.verdict === "all" || card.dataset.verdict === chosen.verdict) &&
      (!chosen.label || (chosen.label === "none" ? !label : label === chosen.label)) &&
      chosen.words.every((word) => text.get(card).includes(word));
  };
  const filter = () => {
    let shown = 0;
    for (const side of all(".side")) {
      let here = 0;
      for (const card of all(".card", side)) {
        card.hidden = !matches(card);
        here += !card.hidden;
      }
      one(".visible", side).textContent = here;
      one(".empty", side).hidden = here > 0;
      side.hidden = chosen.verdict !== "all" && side.dataset.side !== chosen.verdict;
      shown += here;
    }
    one("#matching").textContent = shown === cards.length ? "" : ` · ${shown} of ${cards.length} match`;
    const sides = all(".side").filter((side) => !side.hidden);
    for (const side of sides) side.classList.toggle("alone", sides.length === 1);
    rove(current && !current.hidden ? current : visible()[0]);
  };
  const sort = (value) => {
    const [name, way] = value.split(" ");
    const score = (card) => JSON.parse(card.dataset.scores)[name];
    for (const side of all(".side")) {
      const mine = cards.filter((card) => card.dataset.verdict === side.dataset.side);
      const scored = mine.filter((card) => score(card) !== undefined);
      if (value) scored.sort((a, b) => (way === "up" ? 1 : -1) * (score(a) - score(b)));
      const rest = mine.filter((card) => !scored.includes(card));
      one(".grid", side).append(...(value ? [...scored, ...rest] : mine));
    }
  };

  // Moving about: one card is the current one, and the only one in the tab order.
  let current = null;
  const visible = () => all(".card").filter((card) => !card.hidden && !card.closest(".side").hidden);
  const rove = (card) => {
    if (current) current.tabIndex = -1;
    current = card || null;
    if (current) current.tabIndex = 0;
  };
  const neighbour = (card, key) => {
    const from = card.getBoundingClientRect();
    const middle = (box) => [box.left + box.width / 2, box.top + Math.min(box.height, 200) / 2];
    const [x, y] = middle(from);
    let best = null, least = Infinity;
    for (const other of visible()) {
      if (other === card) continue;
      const [ox, oy] = middle(other.getBoundingClientRect());
      const along = { ArrowLeft: x - ox, ArrowRight: ox - x, ArrowUp: y - oy, ArrowDown: oy - y }[key];
      const across = key === "ArrowLeft" || key === "ArrowRight" ? Math.abs(oy - y) : Math.abs(ox - x);
      if (along > 10 && along + 3 * across < least) [best, least] = [other, along + 3 * across];
    }
    return best;
  };
  const go = (card) => {
    if (!card) return;
    rove(card);
    card.focus({ preventScroll: true });
    card.scrollIntoView({ block: "nearest" });
    const box = card.getBoundingClientRect(), bar = one("#bar").getBoundingClientRect();
    if (box.top < bar.bottom + 8) scrollBy(0, box.top - bar.bottom - 8);
  };

  // One sample, large.
  const closer = one("#closer");
  const open = (card) => {
    rove(card);
    const media = one(".media", card).cloneNode(true);
    for (const video of all("video", media)) {
      video.src = video.dataset.src;
      video.controls = true;
      video.muted = true;
      if (playing) video.autoplay = true;
    }
    one(".stage", closer).replaceChildren(media);
    const words = [one(".prompt", card), ...all(".reasons", card)].map((node) => node.cloneNode(true));
    const more = one(".more", card).cloneNode(true);
    one(".text", closer).replaceChildren(...words, ...more.childNodes);
    one(".text", closer).scrollTop = 0;
    one(".verdict", closer).textContent = card.dataset.verdict;
    one(".verdict", closer).className = "verdict key " + card.dataset.verdict;
    one("#note").value = (labels.get(card.dataset.id) || {}).note || "";
    if (!closer.open) closer.showModal();
    paint(card);
    closer.focus();
  };
  const step = (by) => {
    const shown = visible();
    const next = shown[shown.indexOf(current) + by];
    if (next) open(next);
  };
  closer.addEventListener("close", () => {
    one(".stage", closer).replaceChildren();
    go(current);
  });
  closer.addEventListener("click", (event) => {
    if (event.target === closer || event.target.closest("[data-close]")) closer.close();
    const by = event.target.closest("[data-step]");
    if (by) step(Number(by.dataset.step));
    const set = event.target.closest("[data-set]");
    if (set) setLabel(current, set.dataset.set);
  });

  document.addEventListener("click", async (event) => {
    const copy = event.target.closest("[data-copy]");
    if (copy) {
      try {
        await navigator.clipboard.writeText(copy.dataset.copy);
        copy.classList.add("copied");
        setTimeout(() => copy.classList.remove("copied"), 1200);
      } catch {
        getSelection().selectAllChildren(copy);
      }
      return;
    }
    const card = event.target.closest(".card");
    if (!card) return;
    const set = event.target.closest("[data-set]");
    rove(card);
    if (set) setLabel(card, set.dataset.set);
    else if (event.target.closest(".media")) open(card);
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !cards.length) return;
    const typing = event.target.matches("input, select, textarea");
    if (typing) {
      if (event.key === "Escape" && event.target.id === "search") event.target.blur();
      return;
    }
    const arrow = event.key.startsWith("Arrow");
    if (closer.open) {
      if (KEYS[event.key]) setLabel(current, KEYS[event.key]);
      else if (event.key === "ArrowLeft" || event.key === "ArrowRight") step(event.key === "ArrowRight" ? 1 : -1);
      else return;
      event.preventDefault();
      return;
    }
    const focused = document.activeElement.closest?.(".card");
    if (event.key === "/") one("#search").focus();
    else if (arrow && focused) go(neighbour(focused, event.key));
    else if (arrow && (event.key === "ArrowRight" || event.key === "ArrowLeft")) go(current);
    else if (KEYS[event.key] && focused) setLabel(focused, KEYS[event.key]);
    else if (KEYS[event.key]) go(current);
    else if (event.key === "Enter" && focused && event.target === focused) open(focused);
    else return;
    event.preventDefault();
  });

  if (!cards.length) return;
  one("#note").addEventListener("input", ({ target }) => {
    const entry = labels.get(current.dataset.id) || { label: "" };
    entry.note = target.value.trim();
    labels.set(current.dataset.id, entry);
    keep();
  });
  for (const button of all("#bar [data-verdict]"))
    button.addEventListener("click", () => {
      chosen.verdict = button.dataset.verdict;
      for (const other of all("#bar [data-verdict]")) other.setAttribute("aria-pressed", String(other === button));
      filter();
    });
  one("#search").addEventListener("input", ({ target }) => {
    chosen.words = target.value.toLowerCase().split(/\s+/).filter(Boolean);
    filter();
  });
  one("#labelled").addEventListener("change", ({ target }) => {
    chosen.label = target.value;
    filter();
  });
  one("#sort").addEventListener("change", ({ target }) => sort(target.value));
  one("#play").addEventListener("click", () => setPlaying(!playing));
  one("#download").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
    link.download = "labels.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
  setPlaying(playing);
  cards.forEach(paint);
  rove(cards[0]);
  keep();
  tell();
})();
