"use strict";
// One example for people: its image or text, labels and numbers, as cards, rows and files. What comes from the data gets
// into the document by textContent alone.

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class") made.className = value;
    else if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((each) => each !== null && each !== undefined));
  return made;
}

class Examples {
  constructor({ description, array }) {
    this.description = description;
    this.classes = description.classes;
    this.given = array(description.given);
    this.suggested = array(description.suggested); // what else it may be
    this.predicted = array(description.predicted);
    this.group = array(description.group);
    this.columns = description.columns.map((column) => ({ ...column, numbers: numbersOf(column, array) }));
    this.byKey = new Map(this.columns.map((column) => [column.key, column]));
    this.hasLabels = this.given.some((label) => label < this.classes.length);
    this.hasPredictions = this.hasLabels && this.predicted.some((label) => label < this.classes.length);
    this.hasSuggestions = this.suggested.some((label) => label < this.classes.length);
    this.urls = new Map();
    this.places = new Map();
  }

  // block: images or texts.
  show({ description, array }) {
    for (const url of this.urls.values()) URL.revokeObjectURL(url);
    this.urls.clear();
    this.images = description.images.map((image) => ({ media: image.media, bytes: array(image) }));
    this.texts = description.texts;
    const numbers = description.numbers ? array(description.numbers) : [];
    this.places = new Map(Array.from(numbers, (number, place) => [number, place]));
  }

  className(label) {
    return label < this.classes.length ? this.classes[label] : null;
  }

  groupName(number) {
    const group = this.description.groups[this.group[number]];
    return group ? group.name : null;
  }

  // Whether the model predicts another class than the label.
  differs(number) {
    return this.className(this.predicted[number]) !== null && this.predicted[number] !== this.given[number];
  }

  image(number) {
    const place = this.places.get(number);
    if (place === undefined || !this.images.length) return null;
    if (!this.urls.has(number)) {
      const { media, bytes } = this.images[place];
      this.urls.set(number, URL.createObjectURL(new Blob([bytes], { type: media })));
    }
    const made = element("img", { alt: `Image of example ${number}`, src: this.urls.get(number) });
    made.addEventListener("load", () => made.classList.toggle("pixels", made.naturalWidth <= 64));
    return made;
  }

  text(number) {
    const place = this.places.get(number);
    return place === undefined || !this.texts.length ? null : this.texts[place];
  }

  // at: [label, value] pairs of where it is on the map.
  card(number, at, short) {
    const kind = this.description.kind, image = this.image(number), text = this.text(number);
    const parts = [];
    if (image) parts.push(image);
    parts.push(element("h3", { textContent: `Example ${number}` }));
    if (text !== null) parts.push(element("p", { class: "text", textContent: text }));
    else if (kind && !image) parts.push(element("p", { class: "about none", textContent: `Its ${kind} is not in this file.` }));
    const rows = [];
    if (this.hasLabels) rows.push(["given label", this.className(this.given[number]) ?? "–", ""]);
    if (this.hasSuggestions) {
      const suggestion = this.className(this.suggested[number]) ?? "–";
      rows.push(this.differs(number) ? ["suggested label", suggestion, "differs"] : ["next likely label", suggestion, ""]);
    }
    if (this.groupName(number)) rows.push(["group", this.groupName(number), ""]);
    for (const [label, value] of at) rows.push([label, value, ""]);
    for (const column of short ? this.columns.filter((each) => each.key === "rank") : this.columns) {
      rows.push([column.label, written(column.numbers[number]), ""]);
    }
    const body = element("tbody");
    for (const [label, value, style] of rows) {
      body.append(element("tr", {}, element("td", { textContent: label }), element("td", { textContent: value, class: style })));
    }
    parts.push(element("table", {}, body));
    return parts;
  }

  // Rows of a table of examples, from one place to another.
  row(number, keys, keep) {
    const cells = [], text = this.text(number);
    const button = element("button", { type: "button", textContent: String(number), "aria-label": `Show example ${number}` });
    button.addEventListener("click", () => keep(number));
    if (this.description.kind === "image") cells.push(element("td", {}, this.image(number)));
    cells.push(element("td", {}, button));
    if (this.description.kind === "text") cells.push(element("td", { class: "text", textContent: text ?? "(not in this file)" }));
    if (this.hasLabels) cells.push(element("td", { textContent: this.className(this.given[number]) ?? "–" }));
    if (this.hasSuggestions) {
      cells.push(element("td", { textContent: this.className(this.suggested[number]) ?? "–", class: this.differs(number) ? "differs" : "agrees" }));
    }
    if (this.description.groups.length) cells.push(element("td", { class: "group", textContent: this.groupName(number) ?? "–" }));
    for (const key of keys) cells.push(element("td", { class: "number", textContent: written(this.byKey.get(key).numbers[number]) }));
    return element("tr", { id: `row-${number}` }, ...cells);
  }

  heads(keys) {
    const heads = [];
    if (this.description.kind === "image") heads.push(["Image", "", ""]);
    heads.push(["Number", "of the example in the data set", ""]);
    if (this.description.kind === "text") heads.push(["Text", "", ""]);
    if (this.hasLabels) heads.push(["Given", "label", ""]);
    if (this.hasSuggestions) heads.push(["Suggested", "what else the label may be; strong where the model predicts another class than the label", ""]);
    if (this.description.groups.length) heads.push(["Group", "", ""]);
    for (const key of keys) heads.push([this.byKey.get(key).label, this.byKey.get(key).about, "number"]);
    return element("tr", {}, ...heads.map(([name, title, style]) => element("th", { scope: "col", textContent: name, title, class: style })));
  }

  // What leaves the page.

  records(numbers) {
    return Array.from(numbers, (number) => {
      const record = { number };
      if (this.hasLabels) record.given = this.className(this.given[number]);
      if (this.hasPredictions) record.predicted = this.className(this.predicted[number]);
      if (this.hasSuggestions) record.suggested = this.className(this.suggested[number]);
      if (this.description.groups.length) record.group = this.groupName(number);
      for (const column of this.columns) {
        const value = column.numbers[number];
        record[column.key] = Number.isFinite(value) ? Number(value.toPrecision(7)) : null;
      }
      return record;
    });
  }

  csv(numbers) {
    const records = this.records(numbers), names = Object.keys(this.records([0])[0]);
    const lines = [names, ...records.map((record) => names.map((name) => record[name]))];
    return lines.map((line) => line.map(cell).join(",") + "\r\n").join("");
  }
}

// A cell of a CSV file. Spreadsheets would run text that begins like a formula, so an apostrophe goes before it.
function cell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  const text = /^[=+\-@\t\r]/.test(value) && !Number.isFinite(Number(value)) ? "'" + value : value;
  return /[",\r\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
}

function download(name, type, content) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  const link = element("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
