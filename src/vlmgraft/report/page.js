"use strict";
(() => {
  const tip = document.getElementById("tip");
  const show = (target, x, y) => {
    tip.textContent = target.getAttribute("aria-label");
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - box.width - 4))}px`;
    tip.style.top = `${Math.max(4, y - box.height - 10)}px`;
  };
  const held = (event) => (event.target.closest ? event.target.closest(".mark") : null);
  document.addEventListener("pointermove", (event) => {
    const target = held(event);
    if (target) show(target, event.clientX, event.clientY);
    else tip.hidden = true;
  });
  document.addEventListener("focusin", (event) => {
    const target = held(event);
    if (!target) { tip.hidden = true; return; }
    const box = target.getBoundingClientRect();
    show(target, box.left, box.top);
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });

  const root = document.documentElement;
  for (const button of document.querySelectorAll("button[data-svg]")) {
    button.addEventListener("click", () => {
      const copy = button.closest("figure").querySelector("svg").cloneNode(true);
      const theme = root.dataset.theme;
      root.dataset.theme = "light";
      const colours = getComputedStyle(root);
      copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
      copy.setAttribute("font-family", "sans-serif");
      const text = new XMLSerializer().serializeToString(copy)
        .replace(/var\((--\w+)\)/g, (_, name) => colours.getPropertyValue(name));
      if (theme) root.dataset.theme = theme; else delete root.dataset.theme;
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
      link.download = `${button.dataset.svg}.svg`;
      link.click();
      URL.revokeObjectURL(link.href);
    });
  }

  const filter = (section) => {
    const off = {};
    for (const box of section.querySelectorAll(".filters input:not(:checked)")) {
      (off[box.name] ||= new Set()).add(box.value);
    }
    const keys = new Set([...section.querySelectorAll(".filters input")].map((box) => box.name));
    for (const key of keys) {
      for (const element of section.querySelectorAll(`[data-${key}]`)) {
        element.hidden = [...keys].some((one) => off[one] && off[one].has(element.dataset[one]));
        element.style.display = element.hidden ? "none" : "";
      }
    }
  };
  for (const section of document.querySelectorAll("section")) {
    section.addEventListener("change", (event) => { if (event.target.closest(".filters")) filter(section); });
    if (section.querySelector(".filters input:not(:checked)")) filter(section);
  }
  for (const button of document.querySelectorAll("button[data-copy]")) {
    button.addEventListener("click", async () => {
      const text = document.getElementById(button.dataset.copy).textContent;
      try { await navigator.clipboard.writeText(text); button.textContent = "copied"; }
      catch { getSelection().selectAllChildren(document.getElementById(button.dataset.copy)); button.textContent = "selected"; }
    });
  }
  const theme = document.getElementById("theme");
  theme.addEventListener("click", () => {
    const dark = getComputedStyle(document.documentElement).colorScheme === "dark"
      || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  });
})();
