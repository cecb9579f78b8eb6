"use strict";
// Curves of the losses, by uPlot.

class Curves {
  constructor(place) {
    this.place = place;
    this.plot = null;
    new ResizeObserver(() => {
      if (this.plot && place.clientWidth && place.clientWidth !== this.plot.width) this.plot.setSize({ width: place.clientWidth, height: 260 });
    }).observe(place);
  }

  show({ steps, values }) {
    const style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue("--" + name).trim();
    const strokes = [colour("accent"), colour("warn"), "#009e73", "#cc79a7"];
    const dashes = [[], [6, 4], [2, 3], [8, 3, 2, 3]];
    if (this.plot) this.plot.destroy();
    const axis = { stroke: colour("soft"), grid: { stroke: colour("faint") }, ticks: { stroke: colour("line") } };
    const number = (_, value) => (value === null || value === undefined ? "–" : written(value));
    const series = Object.keys(values).map((label, k) => ({
      label, stroke: strokes[k % 4], dash: dashes[k % 4], width: 2, spanGaps: true, value: number, points: { show: steps.length < 60 },
    }));
    this.plot = new uPlot(
      {
        width: this.place.clientWidth, height: 260, cursor: { drag: { x: true, y: false } }, scales: { x: { time: false } },
        axes: [{ ...axis, label: "training step", labelSize: 24 }, { ...axis, label: "loss, mean over the examples", labelSize: 24, size: 60 }],
        series: [{ label: "step", value: number }, ...series],
      },
      [steps, ...Object.values(values)],
      this.place,
    );
  }
}
