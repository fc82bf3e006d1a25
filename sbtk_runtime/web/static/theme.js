// The colour theme. Not a module, so that it applies before the first paint.
(() => {
  /** @typedef {"system" | "light" | "dark"} Theme */
  const KEY = "sbtk-theme";
  const NEXT = { system: "light", light: "dark", dark: "system" };
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
    const button = document.getElementById("theme");
    button?.setAttribute("aria-label", `Theme: ${theme}`);
    button?.setAttribute("title", `Theme: ${theme} (T)`);
  }

  let theme = load();
  apply(theme);
  document.addEventListener("DOMContentLoaded", () => {
    apply(theme);
    document.getElementById("theme")?.addEventListener("click", () => {
      theme = /** @type {Theme} */ (NEXT[theme]);
      apply(theme);
      try {
        localStorage.setItem(KEY, theme);
      } catch {
        // Storage is blocked: the theme applies until the page is closed.
      }
    });
  });
})();
