"""Writes Italian sentences by a small grammar, 200 words in some million sentences: what docs/finetuning.md reads aloud.

    python -m recipes.second_language.sentences --out data/italian

* whisper.txt, train.txt, validation.txt and test.txt: everyday life, no sentence twice.
* trains.txt and trains_test.txt: announcements of trains, a domain that the others do not touch.
"""

import argparse
import random
from pathlib import Path


EVERYDAY = {"validation": 100, "test": 300, "whisper": 1000, "train": 1500}
TRAINS = {"trains_test": 150, "trains": 1000}
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
KINDS = "treno; treno regionale; treno veloce; treno notturno; treno straordinario"
NUMBERS = "due; tre; quattro; dodici; quindici; venti; trenta; quaranta"
WEATHER = """piove; nevica; c'è il sole; fa molto freddo; il cielo è coperto; soffia un vento forte; il mare è calmo;
la temperatura scende; arriva la nebbia"""
DAYS = "domani; giovedì; sabato; nel pomeriggio; questa notte; fino a domenica"
SHOPS = "il museo; la farmacia; la banca; il teatro; l'ufficio postale; il supermercato; la piscina"


def draw(rng: random.Random, words: str) -> str:
    return " ".join(rng.choice(words.split(";")).split())


def hour(rng: random.Random) -> str:
    return f"{draw(rng, HOURS)} {draw(rng, MINUTES)}".strip()


def everyday(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.7:
        verbs, objects = rng.choice(ACTS)
        text = f"{draw(rng, PEOPLE)} {draw(rng, verbs)} {draw(rng, objects)} {draw(rng, PLACES)}"
        text += f" {draw(rng, TIMES)}." if rng.random() < 0.6 else "."
    elif kind < 0.85:
        text = f"{draw(rng, DAYS)} a {draw(rng, CITIES)} {draw(rng, WEATHER)}, poi {draw(rng, WEATHER)}."
    else:
        text = f"scusi, {draw(rng, SHOPS)} di {draw(rng, CITIES)} apre alle {hour(rng)}?"
    return text[0].upper() + text[1:]


def train(rng: random.Random) -> str:
    text = f"Il {draw(rng, KINDS)} per {draw(rng, CITIES)} delle {hour(rng)}"
    if rng.random() < 0.5:
        return f"{text} parte dal binario {draw(rng, NUMBERS)}."
    return f"{text} viaggia con {draw(rng, NUMBERS)} minuti di ritardo."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    args = parser.parse_args(argv)

    args.out.mkdir(parents=True, exist_ok=True)
    for files, sentence in ((EVERYDAY, everyday), (TRAINS, train)):
        rng = random.Random(0)
        sentences = iter(dict.fromkeys(sentence(rng) for _ in range(2 * sum(files.values()))))
        for name, count in files.items():
            lines = [next(sentences) for _ in range(count)]
            (args.out / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
