"use strict";
(() => {
  const COLORS = [
    "#ff5c8a", "#2ec4ff", "#ffc233", "#a58bff", "#4fd67c", "#ff8f5a",
    "#f07be0", "#8fb4ff", "#c8d94a", "#3fd6c0", "#ffa8a0", "#d3b48c",
  ];
  const NARROWEST = 272, GAP = 28, SPARE_ROWS = 2, MOST_TABS = 8;
  const SVG = "http://www.w3.org/2000/svg";
  const find = (id) => document.getElementById(id);
  const pictures = JSON.parse(find("data").textContent);
  const gallery = find("gallery"), filters = find("filters"), viewer = find("viewer");

  // Texts of the data only ever become text nodes and attribute values, never markup.
  function make(name, attributes, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes ?? {})) node.setAttribute(key, value);
    node.append(...children.filter((child) => child !== null));
    return node;
  }
  function draw(name, attributes, ...children) {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }
  const percent = (score) => (score == null ? "" : `${Math.round(score * 100)}%`);
  const format = (number) => number.toLocaleString("en");
  const seconds = (value) => (value < 0.9995 ? `${Math.round(value * 1000)} ms` : `${value.toPrecision(3)} s`);

  // The commonest labels get colors first, so that neighbours seldom share one.
  const colors = new Map();
  function color(label) {
    if (!colors.has(label)) colors.set(label, COLORS[colors.size % COLORS.length]);
    return colors.get(label);
  }
  for (const row of document.querySelectorAll(".pick")) color(row.dataset.label);
  const known = new Set();
  for (const picture of pictures)
    for (const result of picture.results)
      for (const [label] of result.marks ?? []) known.add(label.toLowerCase());

  // ---- filters -------------------------------------------------------------------------------
  const wanted = { status: "", model: "", label: "", whole: false };
  let shown = [];

  function readFilters() {
    wanted.status = filters.elements.status.value;
    wanted.model = filters.elements.model.value;
    wanted.label = (filters.elements.label?.value ?? "").trim().toLowerCase();
    wanted.whole = known.has(wanted.label);
    for (const row of document.querySelectorAll(".pick"))
      row.setAttribute("aria-pressed", String(row.dataset.label.toLowerCase() === wanted.label));
    shown = pictures.filter((picture) => picture.results.some(fits));
    find("shown").textContent = shown.length === pictures.length
      ? `${format(shown.length)} ${shown.length === 1 ? "picture" : "pictures"}`
      : `${format(shown.length)} of ${format(pictures.length)} pictures`;
    find("clear").hidden = !(wanted.status || wanted.model || wanted.label);
    find("empty").hidden = shown.length > 0;
    for (const card of cards.values()) card.remove();
    cards.clear();
    arrange();
    const top = gallery.getBoundingClientRect().top + scrollY - filters.offsetHeight;
    if (scrollY > top) scrollTo(0, top);
  }
  const fitsLabel = (label) =>
    !wanted.label || (wanted.whole ? label.toLowerCase() === wanted.label : label.toLowerCase().includes(wanted.label));
  const fitsModel = (result) => !wanted.model || result.model === wanted.model;
  function fits(result) {
    if (!fitsModel(result)) return false;
    if (wanted.status === "rejected" ? !result.rejected : wanted.status && result.ok !== (wanted.status === "ok")) return false;
    return !wanted.label || (result.marks ?? []).some(([label]) => fitsLabel(label));
  }
  function chooseLabel(label) {
    filters.elements.label.value = wanted.label === label.toLowerCase() ? "" : label;
    readFilters();
  }

  // ---- a picture with its boxes --------------------------------------------------------------
  function buildPicture(picture, results, { name, large }) {
    const caption = results.find((result) => result.caption)?.caption ?? picture.source;
    const frame = make(name, { class: "picture", "aria-label": caption });
    if (!picture.url) {
      frame.append(buildAbsent(picture.source || "No source"));
      return frame;
    }
    const image = make("img", { alt: "", decoding: "async", loading: large ? "eager" : "lazy" });
    const boxes = draw("svg", { class: "boxes" });
    const marks = results.flatMap((result) => result.marks ?? []).filter((mark) => mark[2]);
    image.addEventListener("load", () => drawBoxes(boxes, image, marks, large));
    image.addEventListener("error", () => frame.replaceChildren(buildAbsent("This picture cannot be loaded")));
    image.src = picture.url;
    frame.append(image, boxes);
    return frame;
  }
  function buildAbsent(text) {
    const icon = draw("svg", { viewBox: "0 0 24 24", "aria-hidden": "true" },
      draw("rect", { x: 3, y: 4.5, width: 18, height: 15, rx: 2 }),
      draw("path", { d: "M3 16l4.5-4.5 4 4M13 13.5l2.5-2.5 5.5 5.5M3.5 21L20.5 3" }));
    return make("span", { class: "absent" }, icon, text.length > 90 ? `${text.slice(0, 90)}…` : text);
  }

  const ruler = document.createElement("canvas").getContext("2d");
  // The overlay has the picture's own pixels for its units and is fitted the way the picture is,
  // so a box lies where it was found at any size; only the tabs' texts need the scale.
  function drawBoxes(boxes, image, marks, large) {
    const wide = image.naturalWidth, high = image.naturalHeight;
    if (!wide || !high || !image.clientWidth) return;
    const scale = Math.max(wide / image.clientWidth, high / image.clientHeight);
    const size = large ? 12 : 11, tall = (size + 6) * scale;
    ruler.font = `600 ${size}px ${getComputedStyle(document.body).fontFamily}`;
    boxes.setAttribute("viewBox", `0 0 ${wide} ${high}`);
    boxes.replaceChildren();
    const tabs = [];
    marks.forEach(([label, score, [x, y, width, height]], index) => {
      const dim = fitsLabel(label) ? "" : "dim";
      const place = { x, y, width, height };
      boxes.append(draw("g", { class: dim, "data-label": label },
        draw("rect", { class: "halo", ...place }),
        draw("rect", { class: "box", stroke: color(label), ...place })));
      if (dim || (!large && index >= MOST_TABS)) return;
      const text = large ? `${label} ${percent(score)}`.trim() : label;
      const room = (ruler.measureText(text).width + 10) * scale;
      const left = Math.max(0, Math.min(x - scale, wide - room));
      const free = (top) => top >= 0 && top + tall <= high && !tabs.some((tab) =>
        left < tab.left + tab.room && tab.left < left + room && top < tab.top + tall && tab.top < top + tall);
      const top = [y - tall, y + height, y, y + height - tall].find(free) ?? Math.max(0, y - tall);
      tabs.push({ left, top, room, text, fill: color(label) });
    });
    for (const { left, top, room, text, fill } of tabs)
      boxes.append(
        draw("path", { fill, d: `M${left} ${top}h${room}v${tall}h${-room}z` }),
        draw("text", { x: left + 5 * scale, y: top + (size + 1.5) * scale, "font-size": size * scale }, text));
  }

  // ---- the words under it --------------------------------------------------------------------
  const dot = (label) => draw("svg", { viewBox: "0 0 8 8", "aria-hidden": "true" },
    draw("circle", { cx: 4, cy: 4, r: 4, fill: color(label) }));

  // Every card is as tall as the next, so that the place of each is known without drawing it:
  // tall enough for the words of nearly all pictures shown; the viewer has the rest.
  function measureWords() {
    const heights = shown.map((picture) => {
      const results = picture.results.filter(fitsModel);
      const lines = results.reduce((sum, result) => sum + (result.error ? 44 : 0) + (result.caption ? 46 : 0)
        + (result.rest ? 44 : 0) + (result.rejected != null ? 26 : result.answers ? 44 : 0), 0);
      return lines + (results.some((result) => result.marks) ? 26 : 0);
    }).sort((one, other) => one - other);
    return Math.min(190, heights[Math.floor(0.98 * (heights.length - 1))] ?? 0) + 30;
  }

  function buildWords(picture, results) {
    const words = make("div", { class: "words" });
    const labels = new Set();
    for (const result of results) {
      if (result.error) words.append(buildFault(result, results.length > 1));
      if (result.caption) words.append(make("p", { class: "caption" }, result.caption));
      if (result.rest) words.append(make("p", { class: "rest" }, result.rest));
      for (const [label] of result.marks ?? []) labels.add(label);
    }
    for (const result of results) {
      if (result.rejected != null) words.append(buildVerdict(decide(result.answers)));
      else if (result.answers) words.append(make("p", { class: "answer" }, result.answers.map(([value]) => value).join(" · ")));
    }
    if (labels.size) words.append(buildChips(labels));
    const quality = results.find((result) => result.quality)?.quality;
    const times = results.map((result) => result.seconds).filter((value) => value != null);
    words.append(make("p", { class: "foot" },
      picture.line == null ? null : make("span", {}, `line ${format(picture.line)}`),
      times.length ? make("span", {}, seconds(Math.max(...times))) : null,
      quality ? make("span", {}, `${quality[0]} quality`) : null));
    return words;
  }
  function buildChips(labels) {
    const chips = make("div", { class: "chips" });
    for (const label of [...labels].slice(0, 12)) {
      const chip = make("button", { class: "chip", type: "button" }, dot(label), label);
      chip.addEventListener("click", () => chooseLabel(label));
      chips.append(chip);
    }
    return chips;
  }
  const buildFault = (result, named) => make("p", { class: "fault" },
    `${named ? `${result.model}: ` : ""}${result.error.message ?? result.error.cause}`);
  const decide = (answers) => {
    const judged = answers.filter((answer) => answer[2]);
    return judged.find((answer) => answer[2] === "yes") ?? judged.find((answer) => answer[2] === "unknown") ?? judged[0];
  };
  const buildVerdict = ([value, question, verdict]) =>
    make("p", { class: `verdict ${verdict}` }, make("b", {}, value), make("span", {}, question));

  // ---- the gallery: only the rows in view are in the page ------------------------------------
  const cards = new Map();
  let columns = 1, width = 0, height = 0;

  function arrange() {
    const room = gallery.clientWidth;
    columns = Math.max(1, Math.floor((room + GAP) / (NARROWEST + GAP)));
    width = Math.floor((room - GAP * (columns - 1)) / columns);
    height = Math.round(width * 0.75) + measureWords();
    gallery.style.height = `${Math.ceil(shown.length / columns) * (height + GAP)}px`;
    fill();
  }
  function fill() {
    const top = -gallery.getBoundingClientRect().top, row = height + GAP;
    const first = Math.max(0, Math.floor(top / row) - SPARE_ROWS) * columns;
    const last = Math.min(shown.length, (Math.ceil((top + innerHeight) / row) + SPARE_ROWS) * columns);
    for (const [index, card] of cards)
      if (index < first || index >= last) {
        card.remove();
        cards.delete(index);
      }
    for (let index = first; index < last; index += 1) {
      if (!cards.has(index)) {
        cards.set(index, buildCard(index));
        gallery.append(cards.get(index));
      }
      const style = cards.get(index).style;
      style.transform = `translate(${(index % columns) * (width + GAP)}px, ${Math.floor(index / columns) * row}px)`;
      style.width = `${width}px`;
      style.height = `${height}px`;
    }
  }
  function buildCard(index) {
    const picture = shown[index];
    const results = picture.results.filter(fitsModel);
    const frame = buildPicture(picture, results, { name: "button", large: false });
    frame.type = "button";
    frame.addEventListener("click", () => open(index));
    return make("article", { class: "card", "data-index": index, "aria-posinset": index + 1, "aria-setsize": shown.length },
      frame, buildWords(picture, results));
  }

  // ---- one picture in full -------------------------------------------------------------------
  let opened = 0;

  function open(index) {
    opened = index;
    const picture = shown[index];
    const results = picture.results.filter(fitsModel);
    if (!viewer.open) viewer.showModal();
    viewer.querySelector(".stage").replaceChildren(buildPicture(picture, results, { name: "div", large: true }));
    const link = picture.url?.startsWith("http")
      ? make("a", { href: picture.url, target: "_blank", rel: "noopener noreferrer" }, picture.source)
      : picture.source;
    const notes = viewer.querySelector(".notes");
    notes.replaceChildren(
      make("h2", {}, picture.line == null ? `Picture ${format(index + 1)}` : `Line ${format(picture.line)}`),
      make("p", { class: "note" }, link), ...results.map(buildSection));
    notes.scrollTop = 0;
  }
  function buildSection(result) {
    const section = make("section", {}, make("h3", {}, result.model,
      make("span", {}, result.seconds == null ? "" : seconds(result.seconds))));
    if (result.error) {
      section.append(buildFault(result, false), make("p", { class: "note" },
        result.error.charged ? `${result.error.cause}; it may have been charged` : result.error.cause));
    }
    if (result.caption) section.append(make("p", { class: "caption" }, result.caption));
    for (const answer of result.answers ?? [])
      section.append(answer[2] ? buildVerdict(answer) : make("p", { class: "answer" }, answer[0]));
    if (result.marks) section.append(buildTable(result.marks));
    if (result.more) section.append(make("p", { class: "note" }, `and ${format(result.more)} more`));
    if (result.quality) section.append(make("p", {}, result.quality.filter((value) => value != null).join(" · ")));
    if (result.rest) section.append(make("p", { class: "rest" }, result.rest));
    if (result.request) section.append(make("p", { class: "note" }, `Request ${result.request}`));
    return section;
  }
  function buildTable(marks) {
    const table = make("table", {});
    for (const [label, score, , note] of marks) {
      const name = make("td", {}, dot(label), label);
      if (note) name.append(make("div", { class: "note" }, note));
      table.append(make("tr", {}, name, make("td", {}, percent(score))));
    }
    return table;
  }

  // ---- events --------------------------------------------------------------------------------
  const soon = (work) => {
    let due = 0;
    return () => {
      cancelAnimationFrame(due);
      due = requestAnimationFrame(work);
    };
  };
  addEventListener("scroll", soon(fill), { passive: true });
  let room = gallery.clientWidth;
  addEventListener("resize", soon(() => {
    if (gallery.clientWidth !== room) {
      room = gallery.clientWidth;
      readFilters();
    } else fill();
    if (viewer.open) open(opened);
  }));
  filters.addEventListener("input", readFilters);
  filters.addEventListener("submit", (event) => event.preventDefault());
  filters.addEventListener("reset", () => setTimeout(readFilters));
  find("label-chart")?.addEventListener("click", (event) => {
    const row = event.target.closest(".pick");
    if (row) chooseLabel(row.dataset.label);
  });
  find("label-chart")?.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      chooseLabel(event.target.dataset.label);
    }
  });
  find("close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("close", () => viewer.querySelector(".stage").replaceChildren());
  viewer.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step && shown[opened + step]) open(opened + step);
  });
  if (matchMedia("(max-width: 900px)").matches) find("figures").open = false;
  readFilters();
})();
