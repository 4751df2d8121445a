"use strict";
(() => {
  const readings = JSON.parse(document.getElementById("readings").textContent);
  const boxes = [...document.querySelectorAll("[data-toggle]")];
  const label = (number) => boxes[number].closest("label");
  const drawn = (number) => document.querySelectorAll(`.chart [data-group="${number}"]`);
  const MOST = 16; // values that fit beside a figure
  const shown = (number) => number === null || boxes[number].checked;

  // Groups: shown and hidden in every figure; pointed at, they stand out.
  const apply = (box) => {
    for (const part of drawn(box.dataset.toggle)) part.style.display = box.checked ? "" : "none";
  };
  const dim = (number) => {
    for (const part of document.querySelectorAll(".chart [data-group]")) {
      part.classList.toggle("dimmed", number !== null && part.dataset.group !== number);
    }
  };
  for (const box of boxes) {
    box.addEventListener("change", () => apply(box));
    const number = box.dataset.toggle;
    const row = label(number);
    row.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && box.checked && dim(number));
    row.addEventListener("pointerleave", () => dim(null));
    apply(box); // a browser may remember boxes over a reload
  }
  const choices = {all: () => true, none: () => false, baseline: (box) => "baseline" in box.dataset};
  for (const button of document.querySelectorAll("[data-show]")) {
    button.addEventListener("click", () => {
      for (const box of boxes) {
        box.checked = choices[button.dataset.show](box);
        apply(box);
      }
    });
  }

  // Values: by pointer, or by arrow keys where the figure has the focus.
  for (const chart of document.querySelectorAll("[data-chart]")) {
    const {top, bottom, marks} = readings[chart.dataset.chart];
    const cursor = chart.querySelector(".cursor");
    const reading = chart.querySelector(".reading");
    let at = -1;

    const line = ([number, text]) => {
      const element = document.createElement("span");
      if (number === null) {
        element.textContent = text;
        return element;
      }
      const swatch = document.createElement("i");
      swatch.style.background = label(number).querySelector("path").style.stroke;
      const value = document.createElement("b"); // first: on a phone the name after it may be cut
      value.textContent = text;
      element.append(swatch, value, label(number).querySelector(".name").textContent);
      return element;
    };
    const read = (index) => {
      at = Math.max(0, Math.min(marks.length - 1, index));
      const mark = marks[at];
      const title = document.createElement("strong");
      title.textContent = mark.name;
      const lines = mark.values.filter(([number]) => shown(number)).map(line);
      const more = document.createElement("span");
      more.textContent = lines.length > MOST ? `and ${lines.length - MOST} more: show fewer groups to read them` : "";
      reading.replaceChildren(title, ...lines.slice(0, MOST), more);
      cursor.hidden = reading.hidden = false;
      cursor.style.left = `${mark.x * 100}%`;
      const height = chart.querySelector("svg").getBoundingClientRect().height;
      cursor.style.top = `${top * height}px`;
      cursor.style.height = `${(bottom - top) * height}px`;
      const room = chart.clientWidth - reading.offsetWidth;
      const beside = mark.x * chart.clientWidth + (mark.x < 0.5 ? 12 : -12 - reading.offsetWidth);
      reading.style.left = `${Math.max(0, Math.min(room, beside))}px`;
      reading.style.top = `${bottom * height * 0.1}px`;
      chart.setAttribute("aria-valuenow", at + 1);
      chart.setAttribute("aria-valuetext", [mark.name, ...lines.map((element) => element.textContent)].join("; "));
    };
    const leave = () => {
      cursor.hidden = reading.hidden = true;
    };
    const nearest = (event) => {
      const box = chart.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width;
      let best = 0;
      marks.forEach((mark, index) => {
        if (Math.abs(mark.x - x) < Math.abs(marks[best].x - x)) best = index;
      });
      return best;
    };
    chart.addEventListener("pointermove", (event) => read(nearest(event)));
    chart.addEventListener("pointerdown", (event) => read(nearest(event)));
    chart.addEventListener("pointerleave", leave);
    chart.addEventListener("focus", () => {
      if (chart.matches(":focus-visible")) read(at < 0 ? marks.length - 1 : at);
    });
    chart.addEventListener("blur", leave);
    chart.addEventListener("keydown", (event) => {
      const steps = {
        ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1,
        PageDown: at - 10, PageUp: at + 10, Home: 0, End: marks.length - 1,
      };
      if (event.key === "Escape") leave();
      if (!(event.key in steps)) return;
      event.preventDefault();
      read(steps[event.key]);
    });
  }
  addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details")) part.open = true;
  });
})();
