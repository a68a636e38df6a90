"use strict";
(() => {
  const root = document.documentElement, charts = JSON.parse(document.getElementById("charts").textContent);
  const system = matchMedia("(prefers-color-scheme: dark)"), button = document.getElementById("theme");
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : system.matches;

  // Colours in the figures are names of CSS variables: "--kept" becomes what it is in the scheme of now.
  const resolve = (value, key, style) => {
    if (Array.isArray(value)) return value.map((v) => resolve(v, key, style));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, resolve(v, k, style)]));
    }
    const names = /color/.test(key) && typeof value === "string" && value.startsWith("--");
    return names ? style.getPropertyValue(value).trim() : value;
  };

  const axis = (own) => ({
    automargin: false, fixedrange: true, gridcolor: "--border", linecolor: "--border", zerolinecolor: "--border", zeroline: false,
    tickfont: { size: 11, color: "--muted" }, ...own,
    title: { ...(own && own.title), font: { size: 12, color: "--muted" } },
  });

  const layout = (own) => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: false, hovermode: "closest",
    separators: ".,",
    hoverlabel: { bgcolor: "--surface", bordercolor: "--border", font: { size: 12, color: "--text" }, align: "left" },
    ...own,
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: "--text" },
    legend: { font: { size: 12, color: "--muted" }, itemclick: false, itemdoubleclick: false, ...own.legend },
    xaxis: axis(own.xaxis), yaxis: axis(own.yaxis),
  });

  const draw = (index) => {
    const style = getComputedStyle(root), { data, layout: own } = charts[index];
    const muted = { size: 11, color: "--muted" };
    const traces = data.map((t) => t.colorbar ? { ...t, colorbar: { ...t.colorbar, tickfont: muted, title: { ...t.colorbar.title, font: muted } } } : t);
    return Plotly.react(`chart-${index}`, resolve(traces, "", style), resolve(layout(own), "", style), { displayModeBar: false, responsive: true });
  };

  // A few at a time, so that the page can be read and scrolled meanwhile.
  let round = 0;
  const drawAll = async () => {
    const mine = ++round;
    delete root.dataset.drawn;
    for (let index = 0; index < charts.length && mine === round; index++) {
      await draw(index);
      if (index % 4 === 3) await new Promise((done) => setTimeout(done, 0));
    }
    if (mine === round) root.dataset.drawn = charts.length;
  };

  const show = () => {
    button.textContent = dark() ? "☀" : "☾";
    button.setAttribute("aria-label", dark() ? "Switch to light" : "Switch to dark");
    drawAll();
  };
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("datakit-theme", root.dataset.theme === (system.matches ? "dark" : "light") ? "" : root.dataset.theme); } catch (e) { /* a file without storage */ }
    show();
  });
  system.addEventListener("change", show);

  const links = new Map([...document.querySelectorAll("nav li a")].map((a) => [a.getAttribute("href").slice(1), a]));
  const sections = [...document.querySelectorAll("main section")];
  const mark = () => {
    const line = innerHeight * 0.3;
    const here = sections.filter((s) => s.getBoundingClientRect().top < line).pop();
    for (const [key, link] of links) link.classList.toggle("here", Boolean(here) && here.id === key);
  };
  addEventListener("scroll", mark, { passive: true });
  mark();
  show();
})();
