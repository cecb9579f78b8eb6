"use strict";
// The map: points with axes, regions and trails around them; pan, zoom, hover, click, lasso, and the way from one
// snapshot to another. It knows nothing of what the examples are.

const MARGIN = { left: 62, right: 12, top: 12, bottom: 46 };
const HOME = { x: 0.5, y: 0.5, width: 1.08, height: 1.08 }; // centre and extent of what is seen, in shares of the axes
const REACH = 14; // pixels within which a point is found
const MOVE = 700; // milliseconds from one snapshot to the next
const FRAME = 36; // milliseconds that a frame in motion may take; where all points take longer, a sample is drawn
const QUIET = 10; // frames after which a motion has ended
const SAMPLE = [20000, 100000]; // points in motion at least, and at first
const MOST_TRAILS = 40;

class MapView {
  // hooks: hover(number or -1, x, y), click(number or -1), lasso(numbers)
  constructor(count, hooks) {
    this.count = count;
    this.hooks = hooks;
    this.stage = document.getElementById("stage");
    this.grid = document.getElementById("grid"); // beneath the points
    this.overlay = document.getElementById("overlay"); // above them, and what hears of hands and keys
    this.points = new Points(document.getElementById("points"), count);
    this.view = { ...HOME };
    this.tool = "pan";
    this.map = null;
    this.snapshot = 0;
    this.blend = 1;
    this.kept = -1;
    this.selected = [];
    this.hidden = null; // colours that are filtered out, by place in the palette
    this.budget = Math.min(count, SAMPLE[1]); // points drawn in motion
    this.moving = false;
    this.last = 0; // when the last frame in motion was
    this.quiet = 0; // frames since the last movement
    this.listen();
    new ResizeObserver(() => this.resize()).observe(this.stage);
  }

  // map: of the description; positions: for each snapshot its x and y in 16 bits.
  show(map, positions, snapshot) {
    const another = this.map === null || this.map.key !== map.key;
    this.map = map;
    this.positions = positions;
    this.snapshot = snapshot;
    this.points.move(positions[snapshot], positions[snapshot]);
    this.blend = 1;
    if (another) this.view = { ...HOME };
    this.draw();
  }

  go(snapshot, animated) {
    if (snapshot === this.snapshot) return;
    this.points.move(this.positions[this.snapshot], this.positions[snapshot]);
    this.snapshot = snapshot;
    const began = performance.now(), still = matchMedia("(prefers-reduced-motion: reduce)").matches || !animated;
    this.blend = still ? 1 : 0;
    const move = (now) => {
      if (this.snapshot !== snapshot) return;
      const t = Math.min(1, Math.max(0, (now - began) / MOVE));
      this.blend = t * t * (3 - 2 * t);
      this.inMotion();
      if (t < 1) requestAnimationFrame(move);
    };
    if (still) this.draw();
    else requestAnimationFrame(move);
  }

  paint(colours, palette) {
    this.colours = colours;
    this.palette = palette;
    this.points.paint(colours, palette);
    this.draw();
  }

  repaint(palette) {
    this.palette = palette;
    this.points.setPalette(palette);
    this.draw();
  }

  select(numbers) {
    this.selected = numbers;
    this.points.pick(numbers);
    this.draw();
  }

  keep(number) {
    this.kept = number;
    this.draw();
  }

  // Geometry: the plot in CSS pixels, and how shares of the axes get there.

  resize() {
    const ratio = window.devicePixelRatio || 1, { clientWidth: width, clientHeight: height } = this.stage;
    this.plot = { x: MARGIN.left, y: MARGIN.top, width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
    const canvas = this.points.canvas;
    Object.assign(canvas.style, { left: this.plot.x + "px", top: this.plot.y + "px", width: this.plot.width + "px", height: this.plot.height + "px" });
    canvas.width = Math.round(this.plot.width * ratio);
    canvas.height = Math.round(this.plot.height * ratio);
    for (const each of [this.grid, this.overlay]) {
      each.width = Math.round(width * ratio);
      each.height = Math.round(height * ratio);
    }
    this.draw();
  }

  toPixel(x, y) {
    const { plot, view } = this;
    return [plot.x + ((x - view.x) / view.width + 0.5) * plot.width, plot.y + (0.5 - (y - view.y) / view.height) * plot.height];
  }

  toShare(px, py) {
    const { plot, view } = this;
    return [view.x + ((px - plot.x) / plot.width - 0.5) * view.width, view.y + (0.5 - (py - plot.y) / plot.height) * view.height];
  }

  placeOf(number, snapshot = this.snapshot) {
    const [x, y] = this.positions[snapshot];
    if (x[number] === MISSING || y[number] === MISSING) return null;
    return this.toPixel(x[number] / (MISSING - 1), y[number] / (MISSING - 1));
  }

  zoom(factor, px = this.plot.x + this.plot.width / 2, py = this.plot.y + this.plot.height / 2) {
    const [x, y] = this.toShare(px, py), view = this.view;
    const bounded = Math.min(Math.max(view.width * factor, 1e-4), 4) / view.width;
    view.width *= bounded;
    view.height *= bounded;
    view.x = x + (view.x - x) * bounded;
    view.y = y + (view.y - y) * bounded;
    this.inMotion();
  }

  pan(dx, dy) {
    this.view.x -= (dx / this.plot.width) * this.view.width;
    this.view.y += (dy / this.plot.height) * this.view.height;
    this.inMotion();
  }

  reset() {
    this.view = { ...HOME };
    this.draw();
  }

  // Drawing: at once in the next frame; in motion perhaps fewer points, and all of them when it has ended.

  draw() {
    if (this.asked) return;
    this.asked = requestAnimationFrame((now) => this.render(now));
  }

  inMotion() {
    this.quiet = 0;
    if (!this.moving) {
      this.moving = true;
      this.last = 0;
      requestAnimationFrame((now) => this.watchMotion(now));
    }
    this.draw();
  }

  // At each frame of a motion: draw more or fewer points by how long the last one took. It has ended after some frames
  // without another movement; by time it could not be told from frames that take long.
  watchMotion(now) {
    const took = now - this.last;
    if (this.last && this.quiet < 2) this.budget = Math.min(this.count, Math.max(SAMPLE[0], this.budget * Math.min(1.15, Math.max(0.4, FRAME / took))));
    this.last = now;
    this.moving = ++this.quiet < QUIET;
    if (this.moving) requestAnimationFrame((next) => this.watchMotion(next));
    else this.draw();
  }

  render(now) {
    this.asked = 0;
    if (!this.map || !this.plot || this.plot.width <= 0 || this.plot.height <= 0) return;
    const { view } = this, ratio = window.devicePixelRatio || 1;
    const near = 1 / Math.max(view.width, 1e-6), most = this.moving ? Math.round(this.budget) : this.count;
    const size = Math.min(10, Math.max(2, Math.min(6, 240 / Math.sqrt(this.count)) * Math.sqrt(near))) * ratio;
    const alpha = Math.min(0.85, Math.max(0.25, (70 / Math.sqrt(most)) * near));
    this.points.draw({
      scale: [2 / view.width, 2 / view.height],
      offset: [(-2 * view.x) / view.width, (-2 * view.y) / view.height],
      blend: this.blend, size, alpha, most,
    });
    const style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue("--" + name).trim();
    this.drawGrid(ratio, colour);
    // The names of the regions stand still, and a canvas that is drawn anew costs as much as many points.
    const moves = this.kept >= 0 || this.selected.length > 0 || Boolean(this.outline);
    if (moves || this.overlayMoved || !this.moving) this.drawOverlay(ratio, colour);
    this.overlayMoved = moves;
  }

  drawGrid(ratio, colour) {
    const pen = this.grid.getContext("2d"), { plot } = this;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, this.grid.width, this.grid.height);
    pen.fillStyle = colour("plot");
    pen.fillRect(plot.x, plot.y, plot.width, plot.height);
    pen.font = "12px system-ui, sans-serif";
    pen.lineWidth = 1;
    this.drawAxis(pen, "x", colour);
    this.drawAxis(pen, "y", colour);
    pen.strokeStyle = colour("line");
    pen.strokeRect(plot.x - 0.5, plot.y - 0.5, plot.width + 1, plot.height + 1);
  }

  drawOverlay(ratio, colour) {
    const pen = this.overlay.getContext("2d"), { plot } = this;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, this.overlay.width, this.overlay.height);
    pen.save();
    pen.beginPath();
    pen.rect(plot.x, plot.y, plot.width, plot.height);
    pen.clip();
    pen.font = "italic 600 14px system-ui, sans-serif";
    pen.textBaseline = "middle";
    for (const [name, x, y] of this.map.regions) {
      const at = [plot.x + x * plot.width, plot.y + (1 - y) * plot.height];
      pen.textAlign = x > 0.5 ? "right" : "left";
      pen.lineWidth = 4;
      pen.strokeStyle = colour("plot");
      pen.globalAlpha = 0.8;
      pen.strokeText(name, ...at);
      pen.globalAlpha = 1;
      pen.fillStyle = colour("soft");
      pen.fillText(name, ...at);
    }
    this.drawTrails(pen, colour);
    if (this.outline) {
      pen.beginPath();
      this.outline.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
      pen.closePath();
      pen.globalAlpha = 0.12;
      pen.fillStyle = colour("accent");
      pen.fill();
      pen.globalAlpha = 1;
      pen.lineWidth = 1.5;
      pen.strokeStyle = colour("accent");
      pen.stroke();
    }
    pen.restore();
  }

  drawAxis(pen, side, colour) {
    const axis = this.map[side], { plot, view } = this, horizontal = side === "x";
    const centre = view[side], extent = horizontal ? view.width : view.height;
    pen.fillStyle = colour("soft");
    for (const [share, text] of ticks(axis, centre - extent / 2, centre + extent / 2, horizontal ? plot.width / 90 : plot.height / 50)) {
      const [px, py] = this.toPixel(horizontal ? share : 0, horizontal ? 0 : share);
      pen.strokeStyle = colour("faint");
      pen.beginPath();
      if (horizontal) pen.moveTo(px, plot.y), pen.lineTo(px, plot.y + plot.height);
      else pen.moveTo(plot.x, py), pen.lineTo(plot.x + plot.width, py);
      pen.stroke();
      pen.textAlign = horizontal ? "center" : "right";
      pen.textBaseline = horizontal ? "top" : "middle";
      if (horizontal) pen.fillText(text, px, plot.y + plot.height + 6);
      else pen.fillText(text, plot.x - 6, py);
    }
    pen.save();
    pen.font = "13px system-ui, sans-serif";
    pen.fillStyle = colour("ink");
    pen.textAlign = "center";
    pen.textBaseline = "top";
    if (horizontal) pen.translate(plot.x + plot.width / 2, plot.y + plot.height + 25);
    else pen.translate(3, plot.y + plot.height / 2), pen.rotate(-Math.PI / 2);
    pen.fillText(axis.label, 0, 0, horizontal ? plot.width : plot.height);
    pen.restore();
  }

  // The ways of the kept example and of a few selected ones through the snapshots, and a ring where the kept one is.
  drawTrails(pen, colour) {
    const numbers = this.selected.length <= MOST_TRAILS ? [...this.selected] : [];
    if (this.kept >= 0) numbers.push(this.kept);
    for (const number of this.positions.length > 1 ? numbers : []) {
      const kept = number === this.kept;
      pen.strokeStyle = colour(kept ? "warn" : "soft");
      pen.globalAlpha = kept ? 0.95 : 0.45;
      pen.lineWidth = kept ? 1.8 : 1;
      pen.beginPath();
      for (let s = 0, begun = false; s < this.positions.length; s++) {
        const at = this.placeOf(number, s);
        if (at === null) continue;
        if (begun) pen.lineTo(...at);
        else pen.moveTo(...at);
        begun = true;
      }
      pen.stroke();
    }
    pen.globalAlpha = 1;
    const at = this.kept >= 0 ? this.placeOf(this.kept) : null;
    if (at === null) return;
    pen.lineWidth = 2.5;
    pen.strokeStyle = colour("warn");
    pen.beginPath();
    pen.arc(at[0], at[1], 9, 0, 2 * Math.PI);
    pen.stroke();
  }

  // Finding examples.

  isShown(number) {
    return !this.palette || this.palette[4 * this.colours[number] + 3] > 100;
  }

  nearest(px, py) {
    const { plot, view } = this, [x, y] = this.positions[this.snapshot], unit = MISSING - 1;
    if (px < plot.x || px > plot.x + plot.width || py < plot.y || py > plot.y + plot.height) return -1;
    const [sx, sy] = this.toShare(px, py), wide = plot.width / view.width / unit, high = plot.height / view.height / unit;
    const cx = sx * unit, cy = sy * unit;
    let best = -1, least = REACH * REACH;
    for (let i = 0; i < this.count; i++) {
      const dx = (x[i] - cx) * wide;
      if (dx > REACH || dx < -REACH || x[i] === MISSING || y[i] === MISSING) continue;
      const dy = (y[i] - cy) * high, distance = dx * dx + dy * dy;
      if (distance < least && this.isShown(i)) {
        least = distance;
        best = i;
      }
    }
    return best;
  }

  // The examples inside an outline: those that lie on a pixel that it fills.
  inside(outline) {
    const { plot, view } = this, mask = document.createElement("canvas");
    mask.width = Math.ceil(plot.width);
    mask.height = Math.ceil(plot.height);
    const pen = mask.getContext("2d", { willReadFrequently: true });
    pen.beginPath();
    outline.forEach(([px, py], i) => (i ? pen.lineTo(px - plot.x, py - plot.y) : pen.moveTo(px - plot.x, py - plot.y)));
    pen.closePath();
    pen.fill();
    const pixels = pen.getImageData(0, 0, mask.width, mask.height).data;
    const [x, y] = this.positions[this.snapshot], found = [], unit = MISSING - 1;
    for (let i = 0; i < this.count; i++) {
      if (x[i] === MISSING || y[i] === MISSING) continue;
      const column = Math.floor(((x[i] / unit - view.x) / view.width + 0.5) * plot.width);
      const row = Math.floor((0.5 - (y[i] / unit - view.y) / view.height) * plot.height);
      if (column < 0 || row < 0 || column >= mask.width || row >= mask.height) continue;
      if (pixels[4 * (row * mask.width + column) + 3] > 127 && this.isShown(i)) found.push(i);
    }
    return found;
  }

  // Hands and keys.

  listen() {
    const overlay = this.overlay, pointers = new Map();
    const place = (event) => {
      const box = overlay.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    let travelled = 0;
    overlay.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      overlay.focus({ preventScroll: true });
      overlay.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, place(event));
      travelled = 0;
      if (pointers.size === 1 && (this.tool === "lasso" || event.shiftKey)) this.outline = [place(event)];
      else this.outline = null;
      this.hooks.hover(-1);
    });
    overlay.addEventListener("pointermove", (event) => {
      const now = place(event), before = pointers.get(event.pointerId);
      if (!before) {
        this.pointed = now;
        if (!this.looking) this.looking = requestAnimationFrame(() => {
          this.looking = 0;
          if (this.pointed && this.map) this.hooks.hover(this.nearest(...this.pointed), ...this.pointed);
        });
        return;
      }
      travelled += Math.hypot(now[0] - before[0], now[1] - before[1]);
      if (this.outline) {
        this.outline.push(now);
        this.draw();
      } else if (pointers.size === 2) {
        const other = [...pointers].find(([id]) => id !== event.pointerId)[1];
        const length = ([x, y]) => Math.max(10, Math.hypot(x - other[0], y - other[1]));
        this.zoom(length(before) / length(now), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
      } else {
        overlay.classList.add("panning");
        this.pan(now[0] - before[0], now[1] - before[1]);
      }
      pointers.set(event.pointerId, now);
    });
    const up = (event) => {
      if (!pointers.delete(event.pointerId)) return;
      overlay.classList.remove("panning");
      const outline = this.outline;
      this.outline = null;
      if (event.type === "pointercancel") return this.draw();
      if (outline && outline.length > 2 && travelled > 8) this.hooks.lasso(this.inside(outline));
      else if (travelled < 5) this.hooks.click(this.nearest(...place(event)));
      this.draw();
    };
    overlay.addEventListener("pointerup", up);
    overlay.addEventListener("pointercancel", up);
    overlay.addEventListener("pointerleave", () => {
      this.pointed = null;
      this.hooks.hover(-1);
    });
    overlay.addEventListener("dblclick", (event) => this.zoom(0.5, ...place(event)));
    overlay.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && document.activeElement !== overlay) return; // the page scrolls
      event.preventDefault();
      this.hooks.hover(-1);
      this.zoom(Math.exp(Math.max(-0.5, Math.min(0.5, event.deltaY * (event.deltaMode ? 0.05 : 0.0015)))), ...place(event));
    }, { passive: false });
    overlay.addEventListener("keydown", (event) => {
      const far = 40, keys = {
        ArrowLeft: () => this.pan(far, 0), ArrowRight: () => this.pan(-far, 0),
        ArrowUp: () => this.pan(0, far), ArrowDown: () => this.pan(0, -far),
        "+": () => this.zoom(0.8), "=": () => this.zoom(0.8), "-": () => this.zoom(1.25), "0": () => this.reset(),
        Escape: () => this.hooks.clear(),
      };
      if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
      event.preventDefault();
      keys[event.key]();
    });
  }
}

// In the place of a map where there is no WebGL: the tables say the same.
class NoMap {
  constructor(error) {
    $("map-about").textContent = error.message;
    $("stage").parentElement.classList.add("without-map");
    for (const name of ["show", "go", "paint", "select", "keep", "draw", "zoom", "reset"]) this[name] = () => {};
  }
}

// Ticks of an axis between two shares of it: [share, text], about as many as asked.
function ticks(axis, from, to, wanted) {
  if (axis.log) {
    const decades = Math.log10(axis.high / axis.low), low = Math.log10(axis.low) + from * decades;
    const high = Math.log10(axis.low) + to * decades, found = [];
    if (high - low > 1.2) {
      const step = Math.max(1, Math.ceil((high - low) / wanted));
      for (let power = Math.ceil(low / step) * step; power <= high; power += step) {
        found.push([(power - Math.log10(axis.low)) / decades, power < -3 || power > 4 ? "10" + superscript(power) : String(Number(Math.pow(10, power).toPrecision(3)))]);
      }
      return found;
    }
    return steps(Math.pow(10, low), Math.pow(10, high), wanted).map(([value, text]) => [(Math.log10(value) - Math.log10(axis.low)) / decades, text]);
  }
  const size = axis.high - axis.low;
  return steps(axis.low + from * size, axis.low + to * size, wanted).map(([value, text]) => [(value - axis.low) / size, text]);
}

function steps(low, high, wanted) {
  const rough = (high - low) / Math.max(1, wanted), power = Math.pow(10, Math.floor(Math.log10(rough)));
  const step = power * [1, 2, 5, 10].find((each) => each * power >= rough), found = [];
  for (let k = Math.ceil(low / step); k * step <= high; k++) found.push([k * step, String(Number((k * step).toPrecision(6)))]);
  return found;
}

function superscript(power) {
  return String(power).replace(/[-0-9]/g, (each) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(each)]);
}
