// Light or dark, chosen before anything is painted; that is why this is no module.
(() => {
  const NEXT = { system: "light", light: "dark", dark: "system" };
  const SAYS = { system: "As the system", light: "Light", dark: "Dark" };
  const root = document.documentElement;

  /** @returns {"system" | "light" | "dark"} */
  function chosen() {
    try {
      const kept = localStorage.getItem("sbtk-theme");
      return kept === "light" || kept === "dark" ? kept : "system";
    } catch {
      return "system"; // Storage may be forbidden.
    }
  }

  /** @param {"system" | "light" | "dark"} theme */
  function show(theme) {
    if (theme === "system") root.removeAttribute("data-theme");
    else root.dataset.theme = theme;
    const button = document.getElementById("theme");
    button?.setAttribute("aria-label", `Theme: ${SAYS[theme].toLowerCase()}`);
    button?.setAttribute("title", `Theme: ${SAYS[theme].toLowerCase()}`);
    button?.setAttribute("data-shows", theme);
  }

  let theme = chosen();
  show(theme);
  document.addEventListener("DOMContentLoaded", () => {
    show(theme);
    document.getElementById("theme")?.addEventListener("click", () => {
      theme = /** @type {"system" | "light" | "dark"} */ (NEXT[theme]);
      show(theme);
      try {
        localStorage.setItem("sbtk-theme", theme);
      } catch {
        // Then it lasts as long as the page.
      }
    });
  });
})();
