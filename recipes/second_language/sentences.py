"""Writes Italian sentences of everyday life by a small grammar: whisper.txt, train.txt, validation.txt, test.txt, disjoint.

    python -m recipes.second_language.sentences --out data/italian

They stand for the transcripts that somebody with another language has. About 200 words in some million sentences, so the
test has new sentences of known words.
"""

import argparse
import random
from pathlib import Path


SENTENCES = {"validation": 100, "test": 300, "whisper": 1000, "train": 1500}
PEOPLE = """mia sorella; il medico; la maestra; nostro zio; il postino; la nonna; il giornalista; un vecchio pescatore;
la vicina; il sindaco; una ragazza di Napoli; il nuovo direttore; la cantante; un turista tedesco; il figlio del fornaio;
la signora Bianchi; un amico di Marco; l'avvocato; la zia Lucia; il cameriere"""
ACTS = (
    (
        "compra; vende; porta; cerca; dimentica",
        "il pane; le arance; un chilo di mele; il pesce fresco; due bottiglie di vino; una torta; il formaggio; i fiori",
    ),
    (
        "legge; scrive; trova; perde; mostra",
        "una lettera; il giornale; un libro di storia; il biglietto; una vecchia fotografia; l'indirizzo; la risposta",
    ),
    (
        "aspetta; saluta; chiama; incontra; ringrazia",
        "il dottore; i suoi amici; la famiglia; un collega; gli studenti; il professore; la guida; i vicini di casa",
    ),
)
PLACES = """al mercato; in piazza; davanti alla chiesa; vicino al porto; alla stazione; nel giardino; sulla spiaggia;
in ufficio; a scuola; dietro l'albergo; in cucina; sotto il ponte; all'ospedale; in biblioteca"""
TIMES = """ogni mattina; il lunedì; dopo pranzo; prima di cena; alle sette; di sera; d'estate; oggi; anche quando piove;
una volta al mese; per la prima volta; senza fretta"""
CITIES = "Roma; Milano; Torino; Bologna; Firenze; Venezia; Palermo; Genova; Verona; Bari; Trieste; Siena"
HOURS = "cinque; sei; otto; nove; dieci; undici"
MINUTES = "; e dieci; e un quarto; e venti; e mezza; meno un quarto"
PLATFORMS = "uno; due; tre; quattro; dodici; quindici"
WEATHER = """piove; nevica; c'è il sole; fa molto freddo; il cielo è coperto; soffia un vento forte; il mare è calmo;
la temperatura scende; arriva la nebbia"""
DAYS = "domani; giovedì; sabato; nel pomeriggio; questa notte; fino a domenica"
SHOPS = "il museo; la farmacia; la banca; il teatro; l'ufficio postale; il supermercato; la piscina"


def draw(rng: random.Random, words: str) -> str:
    return " ".join(rng.choice(words.split(";")).split())


def sentence(rng: random.Random) -> str:
    kind = rng.random()
    hour = f"{draw(rng, HOURS)} {draw(rng, MINUTES)}".strip()
    if kind < 0.6:
        verbs, objects = rng.choice(ACTS)
        text = f"{draw(rng, PEOPLE)} {draw(rng, verbs)} {draw(rng, objects)} {draw(rng, PLACES)}"
        text += f" {draw(rng, TIMES)}." if rng.random() < 0.6 else "."
    elif kind < 0.75:
        text = f"il treno per {draw(rng, CITIES)} parte alle {hour} dal binario {draw(rng, PLATFORMS)}."
    elif kind < 0.9:
        text = f"{draw(rng, DAYS)} a {draw(rng, CITIES)} {draw(rng, WEATHER)}, poi {draw(rng, WEATHER)}."
    else:
        text = f"scusi, {draw(rng, SHOPS)} di {draw(rng, CITIES)} apre alle {hour}?"
    return text[0].upper() + text[1:]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the four files")
    args = parser.parse_args(argv)

    rng = random.Random(0)
    sentences = iter(dict.fromkeys(sentence(rng) for _ in range(2 * sum(SENTENCES.values()))))
    args.out.mkdir(parents=True, exist_ok=True)
    for name, count in SENTENCES.items():
        lines = [next(sentences) for _ in range(count)]
        (args.out / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
