"use strict";
// Blocks of arrays, as vlearn/report_page/packing.py writes them.

const ARRAYS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };
const MISSING = 65535;

async function unpack(compressed) {
  const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const description = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const array = (entry) => {
    const kind = ARRAYS[entry.type];
    return new kind(buffer, 4 + length + entry.at, entry.bytes / kind.BYTES_PER_ELEMENT);
  };
  return { description, array };
}

// The bytes of a block that is in the document, whose text is let go.
function embedded(name) {
  const element = document.getElementById("block-" + name);
  if (element === null) return null;
  const text = element.textContent;
  element.remove();
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const binary = atob(text), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

async function fetched(name) {
  const answer = await fetch(name, { cache: "no-store" });
  if (!answer.ok) throw new Error(await answer.text());
  return new Uint8Array(await answer.arrayBuffer());
}

// Column of numbers of all examples, NaN where one is not known.
function numbersOf(column, array) {
  const stored = array(column.values);
  if (column.values.type === "f4") return stored;
  const values = new Float32Array(stored.length);
  if (column.values.type === "u4") {
    for (let i = 0; i < values.length; i++) values[i] = stored[i] || NaN;
    return values;
  }
  for (let i = 0; i < values.length; i++) values[i] = stored[i] === MISSING ? NaN : onScale(stored[i] / (MISSING - 1), column);
  return values;
}

// Value at a share in [0, 1] of a scale, and the share of a value.
function onScale(share, scale) {
  return scale.log ? scale.low * Math.pow(scale.high / scale.low, share) : scale.low + share * (scale.high - scale.low);
}

function shareOf(value, scale) {
  if (!scale.log) return (value - scale.low) / (scale.high - scale.low);
  return value <= scale.low ? 0 : Math.log(value / scale.low) / Math.log(scale.high / scale.low);
}

function written(value) {
  if (!Number.isFinite(value)) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(size >= 1000 ? 5 : 3)));
}
