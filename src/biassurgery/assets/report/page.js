// Draws the charts, fills the tables when they are opened, and hands out PNG and CSV.
const MOST_ROWS = 200;
const parts = JSON.parse(document.getElementById("data").textContent);
const views = {};

function rowsOf(columns) {
  const names = Object.keys(columns);
  const count = names.length ? columns[names[0]].length : 0;
  return Array.from({ length: count }, (_, i) =>
    Object.fromEntries(names.map((name) => [name, columns[name][i]])));
}

function theme() {
  const style = getComputedStyle(document.documentElement);
  const text = style.getPropertyValue("--text").trim();
  const line = style.getPropertyValue("--line").trim();
  return {
    background: "transparent",
    axis: { labelColor: text, titleColor: text, gridColor: line, domainColor: line, tickColor: line },
    legend: { labelColor: text, titleColor: text, orient: "bottom" },
    view: { stroke: null },
    font: "system-ui, sans-serif",
  };
}

async function draw(part) {
  const place = document.querySelector(`#${part.name} .chart`);
  if (!place) return;
  const spec = {
    $schema: "https://vega.github.io/schema/vega-lite/v6.json",
    width: "container",
    autosize: { type: "fit-x", contains: "padding" },
    ...part.chart,
    data: { name: "rows", values: rowsOf(part.columns) },
  };
  const { view } = await vegaEmbed(place, spec, { actions: false, renderer: "svg", config: theme() });
  views[part.name] = view;
}

function shown(value) {
  if (typeof value !== "number") return value ?? "";
  const size = Math.abs(value);
  if (size >= 1e4 && size < 1e12) return Math.round(value).toLocaleString("en-US");
  if (Number.isInteger(value)) return value;
  return size >= 1e-3 && size < 1e12 ? value.toPrecision(4) : value.toExponential(3);
}

function table(columns) {
  const names = Object.keys(columns);
  const count = columns[names[0]].length;
  const rows = rowsOf(columns).slice(0, MOST_ROWS);
  const made = document.createElement("table");
  const head = made.createTHead().insertRow();
  for (const name of names) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = name;
    head.append(cell);
  }
  const body = made.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    for (const name of names) {
      const cell = line.insertCell();
      cell.textContent = shown(row[name]);
      if (typeof row[name] === "string") cell.className = "text";
    }
  }
  const more = count - rows.length;
  if (more > 0) made.createCaption().textContent = `the first ${rows.length}, and ${more} more in the CSV`;
  return made;
}

function save(name, address) {
  const link = document.createElement("a");
  link.download = name;
  link.href = address;
  link.click();
}

function quoted(value) {
  const text = value === null ? "" : String(value);
  return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function csv(columns) {
  const names = Object.keys(columns);
  const rows = rowsOf(columns).map((row) => names.map((name) => quoted(row[name])).join(","));
  return [names.map(quoted).join(","), ...rows].join("\n");
}

for (const part of parts) {
  const section = document.getElementById(part.name);
  const details = section.querySelector("details");
  const fill = () => {
    const place = details.querySelector(".scroll");
    if (details.open && !place.firstChild) place.append(table(part.columns));
  };
  if (details) {
    details.addEventListener("toggle", fill);
    fill();
  }
  section.querySelector('[data-get="csv"]')?.addEventListener("click", () =>
    save(`${part.name}.csv`, URL.createObjectURL(new Blob([csv(part.columns)], { type: "text/csv" }))));
  section.querySelector('[data-get="png"]')?.addEventListener("click", async () =>
    save(`${part.name}.png`, await views[part.name].toImageURL("png", 2)));
}

async function drawAll() {
  for (const part of parts) if (part.chart) await draw(part);
  document.documentElement.dataset.drawn = "yes";
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
drawAll();
