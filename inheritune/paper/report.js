"use strict";
(async () => {
  const DARK = {
    "#0072B2": "#58B4EC", "#D55E00": "#FF8A3D", "#009E73": "#2FC796", "#CC79A7": "#E59CC4", "#E69F00": "#F2B632",
    "#56B4E9": "#A6DAFA", "#000000": "#E4E7EB", "#555555": "#9AA5B1",
  };
  const STROKES = { solid: "solid", dot: "dotted" };
  const ICONS = [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]]; // none of them leaves the page
  const PHONE = matchMedia("(max-width: 640px)");
  const NIGHT = matchMedia("(prefers-color-scheme: dark)");
  const TOUCH = matchMedia("(pointer: coarse)");
  const hidden = new Map(); // chart -> the names of its lines that are switched off

  async function unpack() {
    const packed = document.getElementById("plotly").textContent.trim();
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const program = document.createElement("script");
    program.textContent = await new Response(stream).text();
    document.head.append(program);
  }

  // The figure of a chart, in the colours of a light or a dark page.
  function read(place) {
    const text = place.nextElementSibling.textContent;
    return JSON.parse(NIGHT.matches ? text.replace(/#[0-9A-F]{6}/g, (color) => DARK[color] || color) : text);
  }

  // The legend is a list below the chart: its names wrap, and it takes no width from the lines.
  function list(place, named) {
    let legend = place.parentElement.querySelector(".legend");
    if (!legend) {
      legend = document.createElement("ul");
      legend.className = "legend";
      place.parentElement.insertBefore(legend, place.nextElementSibling.nextElementSibling);
    }
    const off = hidden.get(place);
    legend.replaceChildren(...named.map((trace) => {
      const item = document.createElement("li"), button = document.createElement("button"), key = document.createElement("i");
      const line = trace.line || {};
      key.style.borderTop = `${line.width ? Math.max(1, line.width) : 0}px ${STROKES[line.dash] || "dashed"} ${line.color}`;
      if (trace.mode === "markers") key.style.cssText = `width: 10px; height: 10px; border-radius: 5px; background: ${trace.marker.color || line.color}`;
      button.append(key, decode(trace.name));
      button.type = "button";
      button.setAttribute("aria-pressed", String(!off.has(trace.name)));
      button.onclick = () => {
        if (!off.delete(trace.name)) off.add(trace.name);
        draw(place);
      };
      item.append(button);
      return item;
    }));
  }

  // Names are escaped for plotly, which reads a few tags in them.
  function decode(name) {
    return name.replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");
  }

  function draw(place) {
    const root = getComputedStyle(document.documentElement);
    const color = (name) => root.getPropertyValue(name).trim();
    const { data, layout } = read(place);
    const named = data.filter((trace) => trace.name);
    if (!hidden.has(place)) hidden.set(place, new Set());
    if (named.length > 1) list(place, named);
    const off = named.filter((trace) => hidden.get(place).has(trace.name)).map((trace) => trace.legendgroup || trace.name);
    for (const trace of data) trace.visible = !off.includes(trace.legendgroup || trace.name);
    const axis = {
      gridcolor: color("--line"), zerolinecolor: color("--line"), linecolor: color("--muted"), showline: true, ticks: "outside",
      tickcolor: color("--muted"), automargin: true,
    };
    Object.assign(layout, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", height: Number(place.dataset.height), uirevision: "kept",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("--text") },
      margin: { l: 48, r: 14, t: 30, b: 44, pad: 0 },
      xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis }, showlegend: false,
      hoverlabel: { bgcolor: color("--soft"), bordercolor: color("--line"), font: { color: color("--text"), size: 12 }, namelength: -1 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: color("--muted"), activecolor: color("--accent") },
      dragmode: TOUCH.matches ? false : "zoom", // on a phone a finger scrolls the page
    });
    if (PHONE.matches && layout.hovermode === "x unified") layout.hovermode = "closest";
    if (layout.hovermode === "closest") {
      for (const trace of named) if (trace.hovertemplate) trace.hovertemplate += "<extra>%{fullData.name}</extra>";
    }
    const config = { responsive: true, displaylogo: false, displayModeBar: TOUCH.matches ? true : "hover", modeBarButtons: ICONS };
    return Plotly.react(place, data, layout, config);
  }

  try {
    await unpack();
    const drawAll = () => Promise.all([...document.querySelectorAll(".chart")].map(draw));
    await drawAll();
    for (const query of [PHONE, NIGHT, TOUCH]) query.addEventListener("change", drawAll);
    document.documentElement.dataset.drawn = "yes";
  } catch (error) {
    for (const place of document.querySelectorAll(".chart")) place.textContent = `This browser cannot draw the chart (${error}).`;
    throw error;
  }
})();
