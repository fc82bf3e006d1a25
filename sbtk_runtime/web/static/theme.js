// The colour theme. Not a module, so that it applies before the first paint.
(() => {
  /** @typedef {"system" | "light" | "dark"} Theme */
  const KEY = "sbtk-theme";
  const root = document.documentElement;

  /** @returns {Theme} */
  function load() {
    try {
      const saved = localStorage.getItem(KEY);
      return saved === "light" || saved === "dark" ? saved : "system";
    } catch {
      return "system"; // Storage is blocked.
    }
  }

  /** @param {Theme} theme */
  function apply(theme) {
    if (theme === "system") root.removeAttribute("data-theme");
    else root.dataset.theme = theme;
  }

  apply(load());
  document.addEventListener("DOMContentLoaded", () => {
    const theme = load();
    for (const radio of document.querySelectorAll("input")) {
      if (radio.name !== "theme") continue;
      radio.checked = radio.value === theme;
      radio.addEventListener("change", () => {
        const chosen = /** @type {Theme} */ (radio.value);
        apply(chosen);
        try {
          localStorage.setItem(KEY, chosen);
        } catch {
          // Storage is blocked: the theme applies until the page is closed.
        }
      });
    }
  });
})();
