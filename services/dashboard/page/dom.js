// Elements from data. Text is only ever text: nothing here parses markup, and the page's policy forbids it.

const SVG = "http://www.w3.org/2000/svg";

/** An element with properties (class, on…, attributes; null leaves out) and children (strings become text). */
export function h(tag, properties, ...children) {
  return filled(document.createElement(tag), properties, children);
}

export function s(tag, properties, ...children) {
  return filled(document.createElementNS(SVG, tag), properties, children);
}

function filled(element, properties, children) {
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.setAttribute("class", value);
    else if (name === "value") element.value = value;
    else if (name === "checked") element.checked = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  append(element, children);
  return element;
}

export function append(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : String(child));
  }
  return element;
}

export function fill(element, ...children) {
  element.replaceChildren();
  return append(element, children);
}

/** A table of rows [cells]; a cell is a node or text. `numeric` are columns set to the right. */
export function table(caption, heads, rows, { numeric = [], shown = false } = {}) {
  const side = (i) => (numeric.includes(i) ? "number" : null);
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    h("table", {},
      h("caption", { class: shown ? null : "unseen" }, caption),
      h("thead", {}, h("tr", {}, heads.map((head, i) => h("th", { scope: "col", class: head ? side(i) : "narrow" }, head || h("span", { class: "unseen" }, "choose"))))),
      h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((cell, i) => h("td", { class: side(i), "data-head": typeof heads[i] === "string" ? heads[i] : null }, cell))))),
    ));
}

export function later(wait, call) {
  let timer = 0;
  const delayed = (...given) => { clearTimeout(timer); timer = setTimeout(() => call(...given), wait); };
  delayed.cancel = () => clearTimeout(timer);
  return delayed;
}

/** At most once in `wait` ms, the last call always. */
export function atMost(wait, call) {
  let timer = 0, last = -Infinity;
  const run = () => { timer = 0; last = performance.now(); call(); };
  const asked = () => { if (!timer) timer = setTimeout(run, Math.max(0, wait - (performance.now() - last))); };
  asked.cancel = () => clearTimeout(timer);
  return asked;
}
