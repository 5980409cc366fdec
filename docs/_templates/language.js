// One page, two languages: blocks of the classes en and zh. Without JavaScript both are shown.
(() => {
  const asked = new URLSearchParams(location.search).get("lang");
  const kept = () => { try { return localStorage.getItem("language"); } catch { return null; } };
  const keep = name => { try { localStorage.setItem("language", name); } catch { /* a private window */ } };
  const known = name => (["en", "zh"].includes(name) ? name : null);
  const show = name => {
    document.documentElement.dataset.language = name;
    document.documentElement.lang = name === "zh" ? "zh-Hans" : "en";
    document.querySelectorAll("#languages button").forEach(button =>
      button.setAttribute("aria-pressed", button.value === name));
  };
  if (known(asked)) keep(asked);
  show(known(asked) || known(kept()) || (navigator.language.startsWith("zh") ? "zh" : "en"));
  addEventListener("DOMContentLoaded", () => {
    const bar = document.createElement("div");
    bar.id = "languages";
    bar.setAttribute("role", "group");
    bar.setAttribute("aria-label", "Language · 语言");
    for (const [name, label] of [["en", "English"], ["zh", "中文"]]) {
      const button = document.createElement("button");
      button.type = "button";
      button.value = name;
      button.textContent = label;
      button.addEventListener("click", () => { keep(name); show(name); });
      bar.append(button);
    }
    document.body.append(bar);
    show(document.documentElement.dataset.language);
  });
})();
