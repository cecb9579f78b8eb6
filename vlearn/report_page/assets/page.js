"use strict";
// The page: what is shown, and what happens when something is pressed.

const CLASS_COLOURS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#9a8f00", "#882255", "#5a6fd6", "#8c6d46"];
const GROUP_COLOURS = { unpredictable: "#d55e00", uncertain: "#e69f00", memorised: "#b04fb8", easy: "#4a90c4" };
const AGREES = ["predicted as labelled", "predicted otherwise"];
const RAMP = ["#3f6fc4", "#2f97b0", "#3fa66b", "#b3a52a", "#e08a1e", "#d1401f"]; // seen on light and on dark
const UNKNOWN_COLOUR = "#8a939c";
const MOST_KEYS = 24; // classes in the legend
const ROWS = 25; // of a table at first, and more at each request
const MOST_IN_GRID = 60; // selected examples that are shown small
const FADED = 22; // opacity, of 255, of what the legend leaves out

const $ = (id) => document.getElementById(id);
const state = { map: 0, snapshot: -1, colour: null, only: null, kept: -1, selected: [], tab: 0, rows: ROWS };
let blocks = null, examples = null, view = null, curves = null, playing = 0;

async function start() {
  const settings = JSON.parse($("settings").textContent);
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => setTheme(event.matches));
  $("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme !== "dark"));
  listen();
  if (settings.poll) return follow(settings.poll);
  show(await unpack(embedded("contents")));
  // The map is there; images and texts come after it.
  requestAnimationFrame(() => setTimeout(async () => {
    ready("map");
    showExamples(await unpack(embedded("examples")));
    ready("all");
  }));
}

// Ask the server whether the record has grown, and show it anew when it has.
async function follow(seconds) {
  let version = null;
  $("live").hidden = false;
  for (;;) {
    try {
      const now = new TextDecoder().decode(await fetched("version"));
      if (now !== version) {
        const contents = await fetched("contents"), shown = await fetched("examples");
        show(await unpack(contents));
        showExamples(await unpack(shown));
        version = now;
        ready("all");
      }
      $("live").textContent = "Live: looks for new snapshots every " + seconds + " s";
    } catch (error) {
      if (!examples) tell(error.message);
      $("live").textContent = error instanceof TypeError ? "The server has ended; this is its last state" : "Waiting: " + error.message;
    }
    await new Promise((go) => setTimeout(go, 1000 * seconds));
  }
}

// For those who wait for the page: what is there, and since when.
function ready(what) {
  document.documentElement.dataset.ready = what;
  performance.mark(what);
}

function tell(text) {
  $("message").hidden = false;
  $("message").textContent = text;
}

function show(unpacked) {
  blocks = unpacked;
  const { description } = unpacked, before = examples;
  examples = new Examples(unpacked);
  if (before) Object.assign(examples, { images: before.images, texts: before.texts, places: before.places, urls: before.urls });
  else Object.assign(examples, { images: [], texts: [] });
  $("message").hidden = true;
  $("main").hidden = false;
  document.title = description.title;
  $("title").textContent = description.title;
  $("facts").textContent = Object.entries(description.facts).map(([name, value]) => `${value} ${name}`).join(" · ") + ` · written ${description.written}`;
  showSummary();
  showConfusions();
  if (view && view.count !== undefined && view.count !== description.numData) return location.reload(); // another run
  if (!view) view = newMap(description.numData);
  fillMaps();
  fillColours();
  showMap();
  fillTabs();
  showTable();
  showSelection();
  showSettings();
  const hasCurves = Object.keys(description.curves.values).length > 0;
  $("curves-panel").hidden = !hasCurves;
  curves = curves || new Curves($("curves"));
  if (hasCurves) curves.show(description.curves);
}

function newMap(count) {
  try {
    return new MapView(count, { hover, click: keep, lasso: select, clear });
  } catch (error) {
    return new NoMap(error);
  }
}

function showExamples(unpacked) {
  examples.show(unpacked);
  showTable();
  showKept();
  showSelection();
}

// Summary: one card a finding; those of groups show their examples alone.

function showSummary() {
  const { description } = blocks, cards = [];
  const card = (name, count, title, about, properties = {}) => {
    const made = element(name, properties, element("b", { textContent: count.toLocaleString("en") }), element("strong", { textContent: title }), element("div", { textContent: about }));
    cards.push(made);
    return made;
  };
  const number = description.expectedIssues;
  if (number !== null) {
    const share = ((100 * number) / description.numData).toFixed(1);
    card("div", number, "labels likely wrong", `${share}% of all, as counted by confident learning`).style.borderLeftColor = "var(--warn)";
  }
  for (const group of description.groups) {
    const made = card("button", group.count, group.name, group.about, { type: "button", "aria-pressed": "false" });
    made.style.borderLeftColor = GROUP_COLOURS[group.name];
    made.dataset.group = group.name;
    made.addEventListener("click", () => {
      const index = description.groups.indexOf(group), on = state.colour === "group" && state.only === index;
      setColour("group", on ? null : index);
    });
  }
  $("summary").replaceChildren(...cards);
}

function showConfusions() {
  const pairs = blocks.description.confusions;
  $("confusions-panel").hidden = !pairs.length;
  $("confusions").replaceChildren(...pairs.map(([given, likely, count]) => element("li", {
    textContent: `${examples.className(given)} → ${examples.className(likely)}: about ${Math.round(count).toLocaleString("en")}` })));
}

// The map.

function fillMaps() {
  const { maps } = blocks.description;
  $("map-choice").replaceChildren(...maps.map((map, k) => element("option", { value: String(k), textContent: map.title })));
  state.map = Math.min(state.map, maps.length - 1);
  $("map-choice").value = String(state.map);
  $("map-choice").parentElement.hidden = maps.length < 2;
}

function showMap() {
  const map = blocks.description.maps[state.map];
  $("stage").hidden = $("slider-row").hidden = !map;
  if (!map) return;
  $("map-title").textContent = map.title;
  if (view instanceof MapView) $("map-about").textContent = map.about;
  $("overlay").setAttribute("aria-label", `${map.title}: ${map.x.label} to the right, ${map.y.label} upwards. The tables below list the same examples.`);
  const last = map.steps.length - 1, range = $("snapshot");
  const atEnd = state.snapshot < 0 || state.snapshot >= Number(range.max);
  range.max = String(last);
  state.snapshot = atEnd ? last : Math.min(state.snapshot, last);
  range.value = String(state.snapshot);
  $("slider-row").hidden = last < 1;
  map.unpacked = map.unpacked || map.positions.map((pair) => pair.map(blocks.array));
  view.show(map, map.unpacked, state.snapshot);
  paint();
  showStep();
}

function showStep() {
  const map = blocks.description.maps[state.map], range = $("snapshot");
  $("step").textContent = `step ${map.steps[state.snapshot].toLocaleString("en")}`;
  range.setAttribute("aria-valuetext", $("step").textContent);
  showKept();
}

function goTo(snapshot, animated = true) {
  state.snapshot = snapshot;
  $("snapshot").value = String(snapshot);
  view.go(snapshot, animated);
  showStep();
}

function play() {
  const last = blocks.description.maps[state.map].steps.length - 1;
  if (playing) return stop();
  if (state.snapshot >= last) goTo(0, false);
  $("play").textContent = "Pause";
  playing = setInterval(() => (state.snapshot < last ? goTo(state.snapshot + 1) : stop()), MOVE + 150);
}

function stop() {
  clearInterval(playing);
  playing = 0;
  $("play").textContent = "Play";
}

// Colours.

function choicesOfColour() {
  const choices = [];
  if (blocks.description.groups.length) choices.push(["group", "Group"]);
  if (examples.hasPredictions) choices.push(["agrees", "Agreement of label and prediction"]);
  if (examples.hasLabels) choices.push(["given", "Given label"]);
  if (examples.hasPredictions) choices.push(["predicted", "Predicted class"]);
  for (const column of examples.columns) choices.push([column.key, column.label]);
  return choices;
}

function fillColours() {
  const choices = choicesOfColour();
  if (!choices.some(([key]) => key === state.colour)) state.colour = choices.length ? choices[0][0] : null;
  $("colour-choice").replaceChildren(...choices.map(([value, textContent]) => element("option", { value, textContent })));
  $("colour-choice").value = state.colour;
}

function setColour(colour, only = null) {
  state.colour = colour;
  state.only = only;
  $("colour-choice").value = colour;
  paint();
}

// Categories of the chosen colour: their names and colours, and each example's; null where it is a number.
function categories() {
  const { numData, groups } = blocks.description;
  if (state.colour === "group") return { names: groups.map((g) => g.name), colours: groups.map((g) => GROUP_COLOURS[g.name]), of: examples.group };
  if (state.colour === "agrees") {
    const of = new Uint8Array(numData);
    for (let i = 0; i < numData; i++) of[i] = examples.className(examples.predicted[i]) === null ? 2 : Number(examples.differs(i));
    return { names: AGREES, colours: [GROUP_COLOURS.easy, GROUP_COLOURS.unpredictable], of };
  }
  if (state.colour === "given" || state.colour === "predicted") {
    const names = examples.classes;
    return { names, colours: names.map((_, k) => CLASS_COLOURS[k % CLASS_COLOURS.length]), of: examples[state.colour] };
  }
  return null;
}

function paint() {
  const { numData } = blocks.description, found = categories(), colours = new Uint8Array(numData), palette = new Uint8Array(1024);
  const put = (place, hex, alpha) => palette.set([1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)).concat(alpha), 4 * place);
  if (found) {
    // More classes than places share colours; the one that is looked at alone has its own place.
    const most = 250, alone = state.only === null ? -1 : state.only;
    for (let i = 0; i < numData; i++) {
      const k = found.of[i];
      colours[i] = k === alone ? 251 : k < found.names.length ? k % most : 252;
    }
    for (let k = 0; k < Math.min(most, found.names.length); k++) put(k, found.colours[k], alone < 0 ? 255 : FADED);
    if (alone >= 0) put(251, found.colours[alone], 255);
    put(252, UNKNOWN_COLOUR, alone < 0 ? 160 : FADED);
    showKeys(found);
  } else if (state.colour) {
    const column = examples.byKey.get(state.colour);
    for (let i = 0; i < numData; i++) {
      const value = column.numbers[i];
      colours[i] = Number.isFinite(value) ? Math.round(250 * Math.min(1, Math.max(0, shareOf(value, column)))) : 252;
    }
    for (let k = 0; k <= 250; k++) put(k, ramp(k / 250), 255);
    put(252, UNKNOWN_COLOUR, 110);
    showRamp(column);
  }
  view.paint(colours, palette);
  for (const card of document.querySelectorAll("#summary button")) {
    const on = state.colour === "group" && state.only !== null && blocks.description.groups[state.only].name === card.dataset.group;
    card.setAttribute("aria-pressed", String(on));
  }
}

function ramp(share) {
  const at = share * (RAMP.length - 1), k = Math.min(Math.floor(at), RAMP.length - 2);
  const channel = (hex, place) => parseInt(hex.slice(place, place + 2), 16);
  return "#" + [1, 3, 5].map((place) => Math.round(channel(RAMP[k], place) + (at - k) * (channel(RAMP[k + 1], place) - channel(RAMP[k], place))).toString(16).padStart(2, "0")).join("");
}

function showKeys({ names, colours }) {
  const keys = names.slice(0, MOST_KEYS).map((name, k) => {
    const dot = element("i"), key = element("button", { type: "button", "aria-pressed": String(state.only === k), title: "Show these alone" }, dot, element("span", { textContent: name }));
    dot.style.background = colours[k];
    key.addEventListener("click", () => setColour(state.colour, state.only === k ? null : k));
    return key;
  });
  if (names.length > MOST_KEYS) keys.push(element("span", { textContent: `and ${names.length - MOST_KEYS} more; colours repeat` }));
  $("legend").replaceChildren(...keys);
}

function showRamp(column) {
  const bar = element("canvas", { width: 180, height: 1, "aria-hidden": "true" }), pen = bar.getContext("2d");
  for (let k = 0; k < 180; k++) {
    pen.fillStyle = ramp(k / 179);
    pen.fillRect(k, 0, 1, 1);
  }
  const scale = column.log ? ", logarithmic" : "";
  $("legend").replaceChildren(element("span", { textContent: written(column.low) }), bar, element("span", { textContent: written(column.high) }), element("span", { textContent: `${column.label}${scale}: ${column.about}` }));
}

// One example.

function whereOnMap(number) {
  const map = blocks.description.maps[state.map];
  if (!map) return [];
  return ["x", "y"].map((side, k) => {
    const place = map.unpacked[state.snapshot][k][number];
    return [`${map[side].label.split(",")[0]}, step ${map.steps[state.snapshot].toLocaleString("en")}`, place === MISSING ? "–" : written(onScale(place / (MISSING - 1), map[side]))];
  });
}

function hover(number, x, y) {
  const card = $("hover");
  card.hidden = number < 0;
  if (number < 0) return;
  if (card.dataset.number !== String(number) || card.dataset.step !== String(state.snapshot)) {
    card.replaceChildren(...examples.card(number, whereOnMap(number), true));
    card.dataset.number = String(number);
    card.dataset.step = String(state.snapshot);
  }
  const { clientWidth: width, clientHeight: height } = $("stage"), gap = 18;
  card.style.left = (x + gap + card.offsetWidth < width ? x + gap : Math.max(0, x - gap - card.offsetWidth)) + "px";
  card.style.top = Math.max(0, Math.min(y - 20, height - card.offsetHeight)) + "px";
}

function keep(number) {
  state.kept = number;
  view.keep(number);
  showKept();
  for (const row of document.querySelectorAll(".rows tr.kept")) row.classList.remove("kept");
  const row = $(`row-${number}`);
  if (row) row.classList.add("kept");
}

function showKept() {
  const place = $("pinned");
  if (state.kept < 0) place.replaceChildren(element("p", { class: "about", textContent: "Point at an example of the map to see it. Click it, or its number in a table, to keep it here and see its way through the run." }));
  else place.replaceChildren(...examples.card(state.kept, whereOnMap(state.kept), false));
}

// Selection.

function select(numbers) {
  state.selected = numbers;
  view.select(numbers);
  showSelection();
}

function clear() {
  select([]);
  keep(-1);
  if (state.only !== null) setColour(state.colour);
}

function showSelection() {
  const count = state.selected.length;
  $("selection-count").textContent = count ? `${count.toLocaleString("en")} example${count > 1 ? "s" : ""} selected.` : "None. Draw a lasso on the map, or select the rows of a table.";
  for (const id of ["export-csv", "export-json", "clear"]) $(id).disabled = !count;
  const small = state.selected.filter((number) => examples.places.has(number)).slice(0, MOST_IN_GRID);
  $("selection-grid").replaceChildren(...small.map((number) => {
    const image = examples.image(number), text = examples.text(number);
    const button = element("button", { type: "button", title: `Example ${number}`, class: image ? "" : "worded" }, image ?? (text.length > 40 ? text.slice(0, 40) + "…" : text));
    button.addEventListener("click", () => keep(number));
    return button;
  }));
}

function exportAs(kind) {
  const name = "examples." + kind, numbers = state.selected;
  if (kind === "csv") return download(name, "text/csv", examples.csv(numbers));
  const { title, written: made } = blocks.description;
  const columns = Object.fromEntries(examples.columns.map((column) => [column.key, `${column.label}: ${column.about}`]));
  download(name, "application/json", JSON.stringify({ title, written: made, columns, examples: examples.records(numbers) }, null, 1));
}

// Tables.

function fillTabs() {
  const { tables } = blocks.description;
  state.tab = Math.min(state.tab, Math.max(0, tables.length - 1));
  $("findings").hidden = !tables.length;
  $("tabs").replaceChildren(...tables.map((table, k) => {
    const tab = element("button", { type: "button", id: `tab-${k}`, role: "tab", "aria-controls": "table", "aria-selected": String(k === state.tab), tabIndex: k === state.tab ? 0 : -1, textContent: `${table.title} (${blocks.array(table.numbers).length.toLocaleString("en")})` });
    tab.addEventListener("click", () => openTab(k));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      openTab((k + step + tables.length) % tables.length);
      $(`tab-${state.tab}`).focus();
    });
    return tab;
  }));
}

function openTab(k) {
  state.tab = k;
  state.rows = ROWS;
  fillTabs();
  showTable();
}

function showTable() {
  const table = blocks.description.tables[state.tab];
  if (!table) return;
  const numbers = blocks.array(table.numbers), body = element("tbody");
  $("table").setAttribute("aria-labelledby", `tab-${state.tab}`);
  for (const number of numbers.subarray(0, state.rows)) body.append(examples.row(number, table.columns, keep));
  const parts = [element("p", { class: "about", textContent: table.about })];
  const below = element("div", { class: "below" });
  if (numbers.length) {
    parts.push(element("div", { class: "scroller" }, element("table", { class: "rows" }, element("thead", {}, examples.heads(table.columns)), body)));
    below.append(element("span", { class: "about", textContent: `${Math.min(state.rows, numbers.length).toLocaleString("en")} of ${numbers.length.toLocaleString("en")} shown` }));
    if (state.rows < numbers.length) {
      const more = element("button", { type: "button", textContent: "Show more" });
      more.addEventListener("click", () => {
        state.rows += 4 * ROWS;
        showTable();
      });
      below.append(more);
    }
    const all = element("button", { type: "button", textContent: `Select all ${numbers.length.toLocaleString("en")}` });
    all.addEventListener("click", () => select(Array.from(numbers)));
    below.append(all);
  } else below.append(element("p", { textContent: "There are none." }));
  $("table").replaceChildren(...parts, below);
}

function showSettings() {
  const { settings, versions } = blocks.description, rows = [...Object.entries(settings), ...Object.entries(versions)];
  $("settings-list").replaceChildren(...rows.flatMap(([name, value]) => [element("dt", { textContent: name }), element("dd", { textContent: value })]));
}

// What can be pressed.

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").textContent = dark ? "Light" : "Dark";
  if (view) view.draw();
  if (curves && curves.plot) curves.show(blocks.description.curves);
}

function setTool(tool) {
  view.tool = tool;
  for (const each of ["pan", "lasso"]) $(`tool-${each}`).setAttribute("aria-pressed", String(each === tool));
}

function listen() {
  $("map-choice").addEventListener("change", () => {
    stop();
    state.map = Number($("map-choice").value);
    state.snapshot = -1;
    showMap();
  });
  $("colour-choice").addEventListener("change", () => setColour($("colour-choice").value));
  $("snapshot").addEventListener("input", () => {
    stop();
    goTo(Number($("snapshot").value));
  });
  $("play").addEventListener("click", play);
  $("tool-pan").addEventListener("click", () => setTool("pan"));
  $("tool-lasso").addEventListener("click", () => setTool("lasso"));
  $("zoom-in").addEventListener("click", () => view.zoom(0.6));
  $("zoom-out").addEventListener("click", () => view.zoom(1 / 0.6));
  $("zoom-reset").addEventListener("click", () => view.reset());
  $("export-csv").addEventListener("click", () => exportAs("csv"));
  $("export-json").addEventListener("click", () => exportAs("json"));
  $("clear").addEventListener("click", clear);
}

start().catch((error) => {
  $("main").hidden = true;
  tell(error.message);
});
