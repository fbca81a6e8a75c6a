// What a reader would stumble over: returns a list of sentences, empty where the page reads well.
() => {
  const wrong = [], root = document.documentElement;
  if (root.scrollWidth > innerWidth) wrong.push(`the page is ${root.scrollWidth} wide in ${innerWidth}`);
  const name = (it) => `${it.tagName}.${it.className} "${it.textContent.trim().slice(0, 30)}"`;
  const shown = (it) => it.getClientRects().length > 0 && !it.closest("[hidden]");
  const scrolled = (it) => it.closest(".scroll");

  // Charts have marks of a size.
  for (const chart of document.querySelectorAll("figure.chart")) {
    if (!shown(chart)) continue;
    const marks = [...chart.querySelectorAll("rect, polyline, .bar i, td.heat, .dot")].filter((mark) => {
      const box = mark.getBoundingClientRect();
      return box.width > 0 || box.height > 0;
    });
    if (!marks.length) wrong.push(`no marks: ${name(chart)}`);
    if (!chart.querySelector("figcaption").textContent) wrong.push(`no title: ${name(chart)}`);
    for (const axis of chart.querySelectorAll(".axis"))
      if (!axis.textContent) wrong.push(`an axis without a title: ${name(chart)}`);
  }

  // Text is neither clipped nor broken letter by letter nor outside of the window.
  const texts = [...document.querySelectorAll("h1, h2, h3, p, li, td, th, figcaption, .card, .tick, .axis, .name, .bar, label, option, code")];
  const pen = document.createElement("canvas").getContext("2d");
  for (const it of texts) {
    const text = it.textContent.trim();
    if (!text || !shown(it) || it.tagName === "OPTION") continue;
    const box = it.getBoundingClientRect(), style = getComputedStyle(it);
    if (!scrolled(it) && (box.left < -1 || box.right > innerWidth + 1)) wrong.push(`outside: ${name(it)}`);
    if (it.scrollWidth > it.clientWidth + 1 && style.display !== "inline" && style.overflowX !== "visible")
      wrong.push(`clipped: ${name(it)}`);
    pen.font = style.font;
    const few = Math.min(pen.measureText(text).width, pen.measureText("nnnnnn").width);
    if (box.width < few * 0.9) wrong.push(`${box.width.toFixed()} pixels wide: ${name(it)}`);
    if (parseFloat(style.fontSize) < 12) wrong.push(`text of ${style.fontSize}: ${name(it)}`);
  }

  // Text stands out from what is behind it: 4.5 to 1, as WCAG 2 has it.
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const paint = canvas.getContext("2d", { willReadFrequently: true });
  const rgb = (color) => {
    paint.clearRect(0, 0, 1, 1);
    paint.fillStyle = color;
    paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data];
  };
  const light = (color) => {
    const [r, g, b] = color.map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const back = (it) => {
    for (; it; it = it.parentElement) {
      const color = rgb(getComputedStyle(it).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255];
  };
  const seen = new Set();
  for (const it of [...texts, ...document.querySelectorAll("span, button, select, input")]) {
    const own = [...it.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!shown(it) || !own) continue;
    const [front, behind] = [rgb(getComputedStyle(it).color), back(it)];
    const [a, b] = [light(front), light(behind)].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05), key = `${front}/${behind}`;
    if (contrast < 4.5 && !seen.has(key)) wrong.push(`contrast ${contrast.toFixed(2)}: ${name(it)}`);
    seen.add(key);
  }
  return [...new Set(wrong)].slice(0, 12);
}
