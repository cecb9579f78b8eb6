"use strict";
// A cloud of points by WebGL2: positions in 16 bits at two snapshots, between which it blends, and a byte of colour.
// The points lie in a scattered order, so that the first k of them are a sample, which is what is drawn in motion where
// all are too many, and so that no class lies on top.

const VERTEX = `#version 300 es
in vec2 from; in vec2 to; in float tint;
uniform float blend, size; uniform vec2 scale, offset; uniform sampler2D palette;
out vec4 colour;
void main() {
  bool gone = to.x == 1.0 || to.y == 1.0;
  bool fresh = from.x == 1.0 || from.y == 1.0;
  vec2 place = (fresh ? to : mix(from, to, blend)) * (65535.0 / 65534.0);
  colour = texelFetch(palette, ivec2(int(tint * 255.0 + 0.5), 0), 0);
  gl_Position = gone || colour.a == 0.0 ? vec4(2.0, 2.0, 0.0, 1.0) : vec4(place * scale + offset, 0.0, 1.0);
  gl_PointSize = size;
}`;
const FRAGMENT = `#version 300 es
precision mediump float;
in vec4 colour; uniform float alpha, round;
out vec4 result;
void main() {
  float cover = 1.0;
  if (round > 0.0) {
    float radius = length(gl_PointCoord - 0.5) * 2.0;
    cover = 1.0 - smoothstep(1.0 - 2.0 / round, 1.0, radius);
  }
  float a = colour.a * alpha * cover;
  result = vec4(colour.rgb * a, a);
}`;

class Points {
  constructor(canvas, count) {
    const gl = canvas.getContext("webgl2", { antialias: false, preserveDrawingBuffer: false });
    if (!gl) throw new Error("This page draws its map by WebGL 2, which this browser does not have or has turned off.");
    canvas.addEventListener("webglcontextlost", () => tell("The browser has taken the map's graphics memory away: load the page again."));
    this.gl = gl;
    this.canvas = canvas;
    this.count = count;
    this.stride = strideOf(count);
    this.program = this.link();
    gl.useProgram(this.program);
    this.at = {};
    for (const name of ["blend", "size", "scale", "offset", "alpha", "round"]) this.at[name] = gl.getUniformLocation(this.program, name);
    this.buffers = { from: this.attribute("from", 2, gl.UNSIGNED_SHORT), to: this.attribute("to", 2, gl.UNSIGNED_SHORT), tint: this.attribute("tint", 1, gl.UNSIGNED_BYTE) };
    this.palette = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, this.palette);
    for (const side of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, side, gl.NEAREST);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    this.picked = gl.createBuffer();
    this.numPicked = 0;
  }

  link() {
    const gl = this.gl, program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program) || "WebGL failed");
    return program;
  }

  attribute(name, size, type) {
    const gl = this.gl, buffer = gl.createBuffer(), place = gl.getAttribLocation(this.program, name);
    gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
    gl.enableVertexAttribArray(place);
    gl.vertexAttribPointer(place, size, type, true, 0, 0);
    return buffer;
  }

  fill(name, array) {
    this.gl.bindBuffer(this.gl.ARRAY_BUFFER, this.buffers[name]);
    this.gl.bufferData(this.gl.ARRAY_BUFFER, array, this.gl.STATIC_DRAW);
  }

  // Where example i lies among the points: i * stride mod count; JavaScript's numbers hold the product exactly.
  slot(i) {
    return (i * this.stride) % this.count;
  }

  move(from, to) {
    this.fill("from", this.scattered(from));
    this.fill("to", from === to ? this.scattered(from) : this.scattered(to));
  }

  scattered([x, y]) {
    const both = new Uint16Array(2 * this.count);
    for (let i = 0, slot = 0; i < this.count; i++) {
      both[2 * slot] = x[i];
      both[2 * slot + 1] = y[i];
      slot += this.stride;
      if (slot >= this.count) slot -= this.count;
    }
    return both;
  }

  // colours: a place in the palette for each example. palette: 256 times red, green, blue, alpha.
  paint(colours, palette) {
    const tints = new Uint8Array(this.count);
    for (let i = 0, slot = 0; i < this.count; i++) {
      tints[slot] = colours[i];
      slot += this.stride;
      if (slot >= this.count) slot -= this.count;
    }
    this.fill("tint", tints);
    this.setPalette(palette);
  }

  setPalette(palette) {
    const gl = this.gl;
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, 256, 1, 0, gl.RGBA, gl.UNSIGNED_BYTE, palette);
  }

  pick(numbers) {
    const slots = Uint32Array.from(numbers, (i) => this.slot(i));
    this.gl.bindBuffer(this.gl.ELEMENT_ARRAY_BUFFER, this.picked);
    this.gl.bufferData(this.gl.ELEMENT_ARRAY_BUFFER, slots, this.gl.STATIC_DRAW);
    this.numPicked = slots.length;
  }

  // scale, offset: from [0, 1]² to [-1, 1]². most: how many points at most.
  draw({ scale, offset, blend, size, alpha, most }) {
    const gl = this.gl, at = this.at, drawn = Math.min(most, this.count);
    gl.viewport(0, 0, this.canvas.width, this.canvas.height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.uniform2fv(at.scale, scale);
    gl.uniform2fv(at.offset, offset);
    gl.uniform1f(at.blend, blend);
    const dim = this.numPicked ? 0.35 : 1;
    this.style(size, alpha * dim);
    gl.drawArrays(gl.POINTS, 0, drawn);
    if (this.numPicked) {
      this.style(size * 1.5, 1);
      gl.drawElements(gl.POINTS, this.numPicked, gl.UNSIGNED_INT, 0);
    }
  }

  style(size, alpha) {
    this.gl.uniform1f(this.at.size, size);
    this.gl.uniform1f(this.at.alpha, Math.min(alpha, 1));
    this.gl.uniform1f(this.at.round, size >= 3 ? size : 0);
  }
}

// A step that visits all places and whose first few are spread evenly: near the golden section, without common divisor.
function strideOf(count) {
  const divisor = (a, b) => (b ? divisor(b, a % b) : a);
  let stride = Math.max(1, Math.round(count * 0.6180339887));
  while (divisor(stride, count) !== 1) stride++;
  return stride % count || 1;
}
