"""The words and phrases by which prompts are told apart, with their weights.

Lower-case and singular; a phrase has up to four words. A task (translate, summarise) weighs more than a topic, because
a summary of a judgment is a summary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["DOMAIN_KEYWORDS", "PATTERNS"]


def _terms(**by_weight: str) -> dict[str, float]:
    """Terms by weight: ``task``, ``sure``, ``usual`` and ``weak`` ones, separated by commas."""
    return {
        term.strip(): weight
        for name, weight in (("task", 3.0), ("sure", 1.0), ("usual", 0.6), ("weak", 0.3))
        for term in by_weight.get(name, "").split(",")
        if term.strip()
    }


DOMAIN_KEYWORDS: Mapping[str, Mapping[str, float]] = {
    "coding": _terms(
        sure="""python, javascript, typescript, java, rust, golang, kotlin, c++, c#, html, css, sql, bash, regex,
            regexp, coding, code, programming, programmer, source code, pseudocode, algorithm, api, rest api, json,
            yaml, xml, debug, debugger, bug, stack trace, traceback, compiler, compile, refactor, unit test, git,
            github, docker, kubernetes, linux, database, sql query, sort a list, linked list, binary tree, binary
            search, data structure, hash table, hashmap, recursion, recursive, boolean, react, django, flask,
            pandas, numpy, web server, frontend, backend, malware, encryption, firewall, buffer overflow, sql
            injection, xss, big o, time complexity, turing machine, operating system, mutex, semaphore,
            multithreading, cpu, ip address, tcp, cache miss, lan, csma, neural network, machine learning, gradient
            descent, backpropagation, overfitting, decision tree, svm, perceptron, classifier, cross validation,
            nosql, npm, pip install, dataframe""",
        usual="""function, software, script, variable, loop, array, string, integer overflow, compute, computer, class
            method, object oriented, method, parser, parse, library, framework, server, query, byte, bit, binary,
            pointer, stack, queue, cache, thread, process scheduling, data type, syntax, terminal, command line,
            protocol, network, packet, router, attack, attacker, vulnerability, password, authentication,
            cryptography, hacker, exploit, website, web, app, deploy, automaton, context free, regular language, np
            complete, data mining""",
        weak="""program, file, input, output, implement, execute, error, exception, user, memory, instruction, model,
            training, feature""",
    ),
    "math": _terms(
        sure="""math, maths, mathematics, algebra, arithmetic, calculus, geometry, trigonometry, integral, integrate,
            derivative, differentiate, polynomial, equation, inequality, theorem, lemma, matrix, eigenvalue,
            determinant, vector space, logarithm, sine, cosine, tangent line, hypotenuse, triangle, rectangle,
            circumference, perimeter, quadratic, factorial, prime number, prime, least common multiple, greatest
            common, modulo, square root, fraction, numerator, denominator, standard deviation, probability,
            permutation, binomial, confidence interval, null hypothesis, p value, regression line, normal
            distribution, random variable, abelian, subgroup, homomorphism, isomorphic, isomorphism, bijective,
            ring, polynomial ring, finite field, field extension, cyclic group, continuous function, differentiable,
            infinite series, converge, complex number, real number, x axis, y axis, xy plane, linear transformation,
            topological, hausdorff, solve for x, multiply, divided by, remainder""",
        usual="""function, solve, sum, subtract, percent, percentage, average, median, angle, radius, diameter, slope,
            coordinate, vertex, graph, integer, digit, decimal, odd number, even number, expression, simplify,
            evaluate, calculate, variance, statistic, statistical, sample, random sample, correlation, proportion,
            ratio, exponent, pi, sequence, cube, divisible, factor, set of, surface area, area of, volume of, total
            number, how much money, each day, per hour, per minute, estimate, round, units, element of order, closed
            interval, value of, dice, coin, marble""",
        weak="""product, number, equal, how many, plus, minus, proof, prove, find the, mean, total, minute, inch, foot,
            mile, dollar, cost, less than, greater than""",
    ),
    "creative": _terms(
        sure="""poem, poetry, haiku, sonnet, limerick, lyric, short story, story, fairy tale, fiction, novel,
            screenplay, plot twist, blog post, roleplay, role play, pretend, imagine yourself, imagine you are, act
            as, in the style of, creative writing, protagonist, persona, monologue, once upon a time, fantasy, write
            a story, write a poem, write a song, embrace the role, slogan, tagline, write a speech, travel blog,
            portray, engaging, captivating, compose, vivid, stay in character, metaphor, descriptive paragraph""",
        usual="""dialogue, character, narrator, scene, brainstorm, essay, joke, rap, rhyme, draft, headline, opening
            line, advertisement, email, letter to, humorous, screenwriter, scenario, catchy, rewrite""",
        weak="write a, write an, story about, creative, name for, imagine, song",
    ),
    "medical": _terms(
        sure="""patient, symptom, diagnosis, diagnose, diagnostic, disease, disorder, syndrome, clinical, clinician,
            physician, nurse, hospital, medication, prescription, dosage, antibiotic, chemotherapy, surgery,
            surgical, biopsy, tumor, tumour, cancer, carcinoma, lesion, infection, vaccine, vaccination, diabetes,
            insulin, hypertension, blood pressure, blood glucose, heart rate, chest pain, headache, fever, nausea,
            vomiting, diarrhea, rash, abdominal, physical examination, medical, medicine, anatomy, artery, aortic,
            vein, nerve, spinal cord, cranial, muscle, ligament, tendon, pelvis, femur, skull, mandible, palate,
            kidney, renal, liver, hepatic, lung, pulmonary, cardiac, stroke, anemia, pregnancy, pregnant, fetus,
            placenta, pediatric, hiv, influenza, hepatitis, ebola, herpes, polio, cerebral, pathogen, immune,
            antibody, year old man, year old woman, month old, catheter, cpr, wound, ulcer, bowel, stomach, bladder,
            prostate, thyroid, asthma, arthritis, mg dl, mm hg, serum, x linked, autosomal, chromosome, inheritance
            pattern, mitochondrial, congenital, allele frequency, paralysis, hormone, vitamin, obesity, nutrient,
            dietary, epidemic, outbreak, virus, viral, retrovirus, cystic fibrosis""",
        usual="""treatment, therapy, drug, dose, pain, health, blood, bone, heart, brain, skin, tissue, gland, joint,
            injury, chronic, acute, severe, prognosis, intake, urine, oxygen saturation, exercise, glycogen, atp,
            recessive, dominant, mutation, gene, genetic, inherited, trial participant, foramen, pharynx, mucosa,
            epithelium, embryological, diet, protein intake, supplement, fatty acid, infected, airway, respiratory,
            metabolism""",
        weak="doctor, history of, examination, mg, condition, risk, body, reflex",
    ),
    "legal": _terms(
        sure="""legal, lawyer, attorney, lawsuit, plaintiff, defendant, court, supreme court, judge, jury, statute,
            statutory, litigation, tort, negligence, negligent, liability, liable, breach of contract, contract law,
            clause, hearsay, testimony, testify, witness, indictment, indicted, felony, misdemeanor, burglary,
            larceny, robbery, murder, manslaughter, homicide, prosecution, prosecutor, arrest, arrested, search
            warrant, warrant, constitutional, unconstitutional, constitution, first amendment, fourth amendment,
            fourteenth amendment, due process, equal protection, jurisdiction, plea, appeal, sued, sue, damages,
            deed, lease, landlord, easement, covenant, grantor, grantee, fee simple, mortgagee, trespass,
            conveyance, conveyed, will and testament, ordinance, international law, treaty, customary law, opinio
            juris, icj, genocide convention, human right, self defense, jurisprudence, natural law, legal
            positivism, positivism, copyright, trademark, patent, gdpr, non disclosure agreement, terms of service,
            common law, law, criminal law, sovereignty, statute of frauds, offeror, offeree, injunction, summary
            judgment, cross examination, admissible, inadmissible, echr""",
        usual="""contract, agreement, police, police officer, evidence, crime, criminal, guilty, convicted, conviction,
            verdict, rule of law, tenant, landowner, buyer, seller, homeowner, owner, inheritance law, regulation,
            comply, judicial, congress, legislation, charged with, counsel, offense, custody, divorce, motion,
            parcel, tract, privilege, obligation, dispute, consent, judgment, state court, federal""",
        weak="party, right, property, claim, trial, rule, state, act",
    ),
    "scientific": _terms(
        sure="""physics, chemistry, biology, astronomy, scientist, scientific, experiment, electron, proton, neutron,
            photon, atom, atomic, nucleus, molecule, molecular, isotope, ion, ionization, oxidation, catalyst,
            chemical, compound, periodic table, reaction rate, equilibrium constant, ph, molarity, mole, solubility,
            precipitate, titration, enthalpy, entropy, thermodynamic, kinetic energy, potential energy, velocity,
            acceleration, momentum, friction, gravity, gravitational, newton, magnetic field, electric field,
            electric charge, capacitor, resistor, voltage, wavelength, frequency, refraction, diffraction, lens,
            laser, spectrum, radiation, radioactive, half life, quantum, relativity, speed of light, planet, solar
            system, star, galaxy, telescope, orbit, comet, asteroid, supernova, cosmology, redshift, jupiter,
            saturn, mars, venus, mercury, photosynthesis, chloroplast, mitochondria, cell wall, cell membrane,
            mitosis, meiosis, protein synthesis, rna, dna, mrna, ribosome, ecosystem, species, natural selection,
            evolution, phylogenetic, biome, predator, food chain, phenotype, genotype, allele, hydrogen bond,
            covalent, ionic, electronegativity, nmr, spin, lattice, semiconductor, superconductor, fluid, buoyant,
            pendulum, joule, kelvin, celsius, ideal gas, hybridization, organic compound, alkene, benzene, chemical
            reaction, habitat, plant, bacterium, bacteria, eukaryotic, prokaryotic""",
        usual="""acid, enzyme, amino acid, energy, force, mass, temperature, heat, pressure, gas, liquid, solid, wave,
            light, charge, current, circuit, density, collision, particle, cell, organism, gene, mutation,
            population, hydrogen, oxygen, nitrogen, carbon, carbon dioxide, sodium, chloride, water, metal, climate,
            soil, earth, moon, sun, solution, reaction, evaporate, element, bond, orbital, electrical, conductor,
            sound, mirror, constant speed, object, membrane, nucleotide, reproductive, fossil, offspring,
            environment, symbiosis, satellite, bridge""",
        weak="theory, observe, concentration, rate, surface, speed, model, system, tree, animal",
    ),
    "translation": _terms(
        task="""translate, translator, how do you say, how would you say, how do i say, how would i say, how to say,
            what is the word for, word for, in spanish, in french, in german, in italian, in japanese, in chinese,
            in korean, in russian, in portuguese, in arabic, into english, into french, into spanish, into german,
            to english, into japanese, into chinese, to french, to spanish, to german, localise, localize""",
        sure="translation of, english translation",
        weak="""translation, spanish, french, german, italian, japanese, chinese, mandarin, korean, russian, portuguese,
            arabic, hindi, vietnamese, swedish""",
    ),
    "summarization": _terms(
        task="""summarize, summarise, summarization, summary, tldr, tl dr, key point, main point, key takeaway,
            takeaway, condense, executive summary, in a nutshell, shorten this, bullet point summary, abstract of,
            recap, gist, give me the gist, boil down""",
        usual="""in one sentence, in two sentences, in three sentences, following article, following text""",
    ),
}
"""The eight domains: their terms, each with its weight."""

PATTERNS: tuple[tuple[str, re.Pattern[str], float], ...] = (
    ("coding", re.compile(r"```|\bdef \w+\(|\b\w+\(\)|[;{]\s*\n|</\w+>|=>|\bprintf?\(|#include"), 1.0),
    (
        "math",
        re.compile(r"\d\s?[-+*/=^\u00d7\u00f7]\s?\d|\b\d*[xyzn]\s?[-+=^]\s?\d|\b[fg]\(x\)|\bmod \d|\\frac|\\int"),
        1.0,
    ),
)
"""What is told by its shape: the domain, the shape, and its weight. No repetition holds another, so none is slow."""
