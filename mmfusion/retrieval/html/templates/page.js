"use strict";
// Text of a catalogue becomes text nodes and attributes set by the DOM, never markup.
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const byId = id => document.getElementById(id);
  const clipped = value => Math.abs(value).toFixed(3).replace(/^0/, "");
  const number = value => value === null || value === undefined ? "–" : (value < 0 ? "−" : "") + clipped(value);
  const signed = value => value === null ? "–" : (value < 0 ? "−" : "+") + clipped(value);
  const words = text => text.toLowerCase().split(/\s+/).filter(Boolean);
  const holds = (text, wanted) => wanted.every(word => text.includes(word));

  function make(tag, className, ...children) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...children.filter(child => child !== null));
    return element;
  }

  // ---- what is built when it comes into sight ----
  const pending = new Map();
  const watcher = new IntersectionObserver(entries => {
    for (const entry of entries) if (entry.isIntersecting) build(entry.target);
  }, {rootMargin: "600px"});
  function build(element) {
    watcher.unobserve(element);
    const action = pending.get(element);
    pending.delete(element);
    if (action) action();
  }
  function later(element, action) {
    pending.set(element, action);
    watcher.observe(element);
  }
  addEventListener("beforeprint", () => [...pending.keys()].forEach(build));

  // ---- figures: var(--name) stands for a colour of the style sheet ----
  const plots = [...document.querySelectorAll("[data-figure]")];
  const drawn = new Set();
  function coloured(value, style) {
    if (typeof value === "string") {
      const name = /^var\((--[a-z0-9-]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map(one => coloured(one, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, coloured(one, style)]));
  }
  function base(style) {
    const colour = name => style.getPropertyValue(name).trim();
    const axis = {
      gridcolor: colour("--grid"), linecolor: colour("--rule"), zerolinecolor: colour("--grid"), zerolinewidth: 1,
      automargin: true, title: {standoff: 6, font: {size: 12, color: colour("--muted")}},
    };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: {l: 44, r: 16, t: 8, b: 40},
      font: {family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--ink")},
      hoverlabel: {
        bgcolor: colour("--raised"), bordercolor: colour("--rule"), font: {color: colour("--ink")}, namelength: -1,
      },
      xaxis: axis, yaxis: axis, bargap: 0.1,
    };
  }
  function draw(plot) {
    const style = getComputedStyle(document.documentElement);
    const figure = coloured(page.figures[Number(plot.dataset.figure)], style);
    const layout = {...figure.layout, template: {layout: base(style)}, autosize: true};
    Plotly.react(plot, figure.data, layout, {displayModeBar: false, responsive: true});
    if (!drawn.has(plot)) plot.on("plotly_click", event => {
      const row = event.points[0].customdata;
      if (page.differences && Number.isInteger(row)) reveal(page.differences.queries[row][0]);
    });
    drawn.add(plot);
  }
  for (const plot of plots) later(plot, () => draw(plot));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));

  // ---- galleries ----
  const gallery = page.gallery;
  const texts = gallery.queries.map(query => query[1].toLowerCase());
  const primary = gallery.metrics.indexOf(page.primary);
  const stride = 1 + gallery.columns.length;
  const textual = !gallery.products.some(product => product[3]);
  const valueOf = (row, query) => primary < 0 ? null : gallery.values[row][query][primary];
  let column = 0;

  function mark(place, ofColumn) {
    const found = place < 0 ? null : gallery.columns[ofColumn].marks[place];
    return found || {label: "not judged", letter: "–", tone: "none"};
  }
  function tile(list, at) {
    const [id, title, photo, hasPhoto] = gallery.products[list[at]];
    const ours = gallery.columns.length ? mark(list[at + 1 + column], column) : mark(-1);
    const labels = gallery.columns.map((one, place) => `${one.name}: ${mark(list[at + 1 + place], place).label}`);
    const frame = make("div", photo ? "frame" : "frame without");
    if (photo) {
      const image = make("img");
      image.src = "data:image/jpeg;base64," + photo;
      image.alt = title || id;
      frame.append(image);
    } else if (!textual) {
      frame.append(make("span", "missing", hasPhoto ? "photo not kept" : "no photo"));
    }
    frame.append(make("span", "mark", ours.letter));
    const whole = make("figure", `tile tone-${ours.tone}`, frame, make("figcaption", "", title || id));
    whole.title = [`${at / stride + 1}. ${title || ""}`, id, ...labels].join("\n");
    return whole;
  }
  function fill(card, query, withTable) {
    const boxes = [...document.querySelectorAll("[data-row]")].filter(box => box.checked);
    const [ours, theirs] = (page.compared || []).map(name => gallery.rows.indexOf(name));
    const heading = make("header", "", make("h4", "", gallery.queries[query][1]));
    const values = [ours, theirs].filter(row => row >= 0).map(row => valueOf(row, query));
    if (values.length === 2 && !values.includes(null)) {
      const named = [ours, theirs].map((row, place) => `${gallery.rows[row]} ${number(values[place])}`);
      heading.append(make("span", "difference", [...named, signed(values[0] - values[1])].join(", ")));
    }
    const parts = [heading];
    if (withTable) parts.push(valueTable(query));
    for (const row of boxes.map(box => Number(box.dataset.row))) {
      const name = make("div", "row-name", gallery.rows[row], make("span", "quiet", number(valueOf(row, query))));
      parts.push(make("div", "row", name, tiles(gallery.lists[row][query])));
    }
    card.replaceChildren(...parts);
    card.classList.toggle("textual", textual);
  }
  function tiles(list) {
    if (!list) return make("p", "quiet note", "Its list is not in this page; rankings.parquet has it.");
    if (!list.length) return make("p", "quiet note", "Found nothing.");
    const all = make("div", "tiles");
    for (let at = 0; at < list.length; at += stride) all.append(tile(list, at));
    return all;
  }
  function valueTable(query) {
    const head = make("tr", "", make("th", "", ""), ...gallery.titles.map(title => make("th", "", title)));
    const body = gallery.rows.map((name, row) => make("tr", "", make("th", "", name),
      ...gallery.values[row][query].map(value => make("td", "", number(value)))));
    return make("div", "wide", make("table", "numbers dense", make("thead", "", head), make("tbody", "", ...body)));
  }
  const cards = [];
  function card(query, withTable) {
    const element = make("article", "card");
    const entry = {element, refill: () => fill(element, query, withTable), built: false};
    later(element, () => { entry.built = true; entry.refill(); });
    return entry;
  }
  for (const place of document.querySelectorAll("[data-gallery]")) {
    for (const query of gallery.galleries[Number(place.dataset.gallery)]) {
      const entry = card(query, false);
      cards.push(entry);
      place.append(entry.element);
    }
  }
  let chosen = null;
  function refill() {
    legend();
    for (const entry of cards) if (entry.built) entry.refill();
    if (chosen) chosen.refill();
  }
  function legend() {
    const place = byId("legend");
    if (!place || !gallery.columns.length) return;
    const marks = gallery.columns[column].marks;
    const few = marks.length <= 8 ? marks : [];
    place.replaceChildren(...[...few, mark(-1)].map(one => {
      const named = make("span", `tone-${one.tone}`, make("span", "mark", one.letter));
      if (one.label !== one.letter) named.append(one.label);
      return named;
    }));
  }
  for (const box of document.querySelectorAll("[data-row]")) box.addEventListener("change", refill);
  for (const radio of document.querySelectorAll("[data-column]")) radio.addEventListener("change", () => {
    column = Number(radio.dataset.column);
    refill();
  });
  legend();

  // ---- search; #q=words opens the first query that has them ----
  const box = byId("search");
  const list = byId("matches");
  let matches = [];
  let active = -1;
  function choose(query, quietly) {
    const entry = {element: make("article", "card"), refill: () => fill(entry.element, query, true)};
    chosen = entry;
    entry.refill();
    byId("chosen").replaceChildren(entry.element);
    box.value = gallery.queries[query][1];
    close();
    byId("found").textContent = "";
    if (!quietly) history.replaceState(null, "", "#" + new URLSearchParams({q: gallery.queries[query][1]}));
  }
  function close() {
    list.hidden = true;
    box.setAttribute("aria-expanded", "false");
    box.removeAttribute("aria-activedescendant");
    active = -1;
  }
  function suggest() {
    const wanted = words(box.value);
    matches = [];
    let all = 0;
    texts.forEach((text, query) => {
      if (!holds(text, wanted)) return;
      all += 1;
      if (matches.length < 50) matches.push(query);
    });
    list.replaceChildren(...matches.map((query, place) => {
      const item = make("li", "", make("span", "", gallery.queries[query][1]), make("span", "quiet", ours(query)));
      item.id = `match-${place}`;
      item.setAttribute("role", "option");
      item.addEventListener("mousedown", event => { event.preventDefault(); choose(query); });
      return item;
    }));
    const cut = all > matches.length ? `, the first ${matches.length} are listed` : "";
    byId("found").textContent = `${all} match${cut}`;
    active = -1;
    list.hidden = !matches.length;
    box.setAttribute("aria-expanded", String(matches.length > 0));
  }
  function ours(query) {
    const row = gallery.rows.indexOf((page.compared || [])[0]);
    return row < 0 ? "" : number(valueOf(row, query));
  }
  function move(step) {
    if (list.hidden) suggest();
    if (!matches.length) return;
    active = (active + step + matches.length + (active < 0 && step < 0 ? 1 : 0)) % matches.length;
    [...list.children].forEach((item, place) => item.setAttribute("aria-selected", String(place === active)));
    list.children[active].scrollIntoView({block: "nearest"});
    box.setAttribute("aria-activedescendant", `match-${active}`);
  }
  function keyed(event) {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      move(event.key === "ArrowDown" ? 1 : -1);
    } else if (event.key === "Enter" && matches.length) {
      event.preventDefault();
      choose(matches[Math.max(active, 0)]);
    } else if (event.key === "Escape") {
      close();
    }
  }
  function linked() {
    const wanted = new URLSearchParams(location.hash.slice(1)).get("q");
    if (wanted === null) return;
    const exact = texts.indexOf(wanted.toLowerCase());
    const query = exact >= 0 ? exact : texts.findIndex(text => holds(text, words(wanted)));
    if (query < 0) {
      chosen = null;
      byId("chosen").replaceChildren();
      box.value = wanted;
      byId("found").textContent = "0 match";
      return;
    }
    choose(query, true);
    byId("queries").scrollIntoView();
  }
  function reveal(queryId) {
    const query = gallery.queries.findIndex(one => one[0] === queryId);
    if (query < 0 || !box) return;
    choose(query);
    byId("queries").scrollIntoView();
  }
  if (box) {
    box.addEventListener("input", suggest);
    box.addEventListener("focus", suggest);
    box.addEventListener("blur", close);
    box.addEventListener("keydown", keyed);
    addEventListener("hashchange", linked);
    linked();
  }

  // ---- differences per query: sorted by a click on a column's head, filtered by words ----
  const table = byId("per-query");
  if (table) {
    const found = page.differences;
    const names = found.queries.map(query => query[1].toLowerCase());
    const [baseline, ...others] = found.letters;
    const minus = place => found.values[place + 1].map((value, row) =>
      value === null || found.values[0][row] === null ? null : value - found.values[0][row]);
    const columns = [
      ...found.letters.map((letter, place) => ({title: letter, values: found.values[place], show: number})),
      ...others.map((letter, place) => ({title: `${letter} − ${baseline}`, values: minus(place), show: signed})),
    ];
    let order = {column: found.letters.length, up: false};
    let limit = 50;
    const heads = ["query", ...columns.map(one => one.title)].map((title, place) => {
      const head = make("th", "", title);
      head.tabIndex = 0;
      const sort = () => {
        order = {column: place - 1, up: order.column === place - 1 ? !order.up : place === 0};
        show();
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
      return head;
    });
    const body = make("tbody");
    table.append(make("thead", "", make("tr", "", ...heads)), body);
    function show() {
      const wanted = words(byId("filter").value);
      const rows = names.map((_, row) => row).filter(row => holds(names[row], wanted));
      const key = order.column < 0 ? row => names[row] : row => columns[order.column].values[row];
      const sign = order.up ? 1 : -1;
      const absent = row => key(row) === null;
      const compared = (a, b) => key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0;
      rows.sort((a, b) => absent(a) - absent(b) || (absent(a) ? 0 : sign * compared(a, b)));
      heads.forEach(head => head.setAttribute("aria-sort", "none"));
      heads[order.column + 1].setAttribute("aria-sort", order.up ? "ascending" : "descending");
      body.replaceChildren(...rows.slice(0, limit).map(row => {
        const link = make("button", "link", found.queries[row][1]);
        link.type = "button";
        link.addEventListener("click", () => reveal(found.queries[row][0]));
        return make("tr", "", make("th", "", link), ...columns.map(one => make("td", "", one.show(one.values[row]))));
      }));
      byId("filtered").textContent = `${rows.length} of ${names.length} queries`;
      byId("more").hidden = rows.length <= limit;
    }
    byId("filter").addEventListener("input", () => { limit = 50; show(); });
    byId("more").addEventListener("click", () => { limit += 200; show(); });
    show();
  }
})();
