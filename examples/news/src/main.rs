//! The `news` program: reads the command line and runs one subcommand.
//!
//! Invariant: results go to files and to stdout, progress and errors to stderr; only rank 0 of a
//! job writes any of it.

use anyhow::{Context, Result, bail};
use clap::Parser;
use gradwire_news::bayes;
use gradwire_news::cli::{Bayes, Cli, Command, Settings, Train};
use gradwire_news::data::{self, LABELS, Split, Title};
use gradwire_news::gradwire_home::Seat;
use gradwire_news::home::{Hyper, LocalHome, Opened};
use gradwire_news::record::{Fold, Record};
use gradwire_news::tensors::TensorDecl;
use gradwire_news::train::{Epoch, Outcome, TrainConfig, train};
use gradwire_news::{report, settings};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

/// A training step makes and drops hundreds of arrays of a few hundred KiB. The system's allocator
/// maps and unmaps each of them, which took a fifth of the step.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Train(options) => run_training(&options),
        Command::Settings(options) => run_settings(&options),
        Command::Bayes(options) => run_bayes(&options),
        Command::Report(options) => report::report(&options.out).map(|text| print!("{text}")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("news: {error:#}");
            // A job that was told to stop has not failed: its launcher knows this code.
            let preempted = matches!(error.downcast_ref(), Some(gradwire::Error::Preempted { .. }));
            ExitCode::from(if preempted { gradwire::launch::EXIT_PREEMPTED } else { 1 })
        }
    }
}

fn labels(titles: &[Title]) -> Vec<usize> {
    titles.iter().map(|title| title.label).collect()
}

fn the_split(titles: &[Title]) -> Split {
    data::split(&labels(titles), data::HELD_OUT, data::SPLIT_SEED)
}

fn run_training(options: &Train) -> Result<()> {
    // The workers of a job share a machine: each would otherwise start a thread for every core.
    rayon::ThreadPoolBuilder::new().num_threads(options.threads).build_global()?;
    match (Seat::take()?, options.local) {
        (Some(seat), false) => train_in_job(options, seat),
        (None, true) => train_here(options),
        (Some(_), true) => bail!("--local keeps the parameters in this process: leave it out in a job"),
        (None, false) => bail!(
            "this program is a worker of a job, which a launcher starts:\n  gradwire run --config \
             examples/news/{model}.toml -- news train --model {model}\nor try it out in one process, without servers:\n  \
             news train --model {model} --local",
            model = options.model.name()
        ),
    }
}

/// Trains as one worker of a job.
fn train_in_job(options: &Train, seat: Seat) -> Result<()> {
    let outcome = plan_in_job(options, &seat).and_then(|plan| Ok((data::load(&options.places.data)?, plan)));
    let (titles, fold) = match outcome {
        Ok(planned) => planned,
        Err(error) => {
            seat.refuse(&format!("{error:#}"));
            return Err(error);
        }
    };
    let config = TrainConfig { seed: seat.seed(), ..options.config() };
    let (workers, mut seat) = (seat.workers(), Some(seat));
    let mut open = |tensors: &[TensorDecl], hyper: &Hyper| -> Result<Opened> {
        seat.take().context("a job trains once")?.open(tensors, hyper)
    };
    let outcome = train(&config, &titles, &split_of(&titles, fold), workers, &mut open)?;
    if outcome.rank == 0 {
        finish(&Record::of(config.model.name(), config.seed, fold, &outcome), &options.places.out)?;
    }
    Ok(())
}

/// Checks the options against the job; gives the fold to train.
fn plan_in_job(options: &Train, seat: &Seat) -> Result<Option<Fold>> {
    if let Some(seed) = options.seed.filter(|seed| *seed != seat.seed()) {
        bail!("--seed {seed}, but the job's seed is {}: give it to `gradwire run`", seat.seed());
    }
    match folds(options)?.as_slice() {
        [fold] => Ok(*fold),
        _ => bail!("a job trains one fold, since clocks and schedule are the job's: say which with --fold"),
    }
}

/// Trains in this process, once or once a fold.
fn train_here(options: &Train) -> Result<()> {
    let (titles, config) = (data::load(&options.places.data)?, options.config());
    for fold in folds(options)? {
        let mut open = |tensors: &[TensorDecl], hyper: &Hyper| Ok(LocalHome::open(tensors, hyper));
        let outcome = train(&config, &titles, &split_of(&titles, fold), 1, &mut open)?;
        finish(&Record::of(config.model.name(), config.seed, fold, &outcome), &options.places.out)?;
    }
    Ok(())
}

/// The folds that the options ask for; `None` is the fixed split.
fn folds(options: &Train) -> Result<Vec<Option<Fold>>> {
    match (options.folds.map(usize::from), options.fold.map(usize::from)) {
        (None, _) => Ok(vec![None]),
        (Some(of), Some(number)) if number > of => bail!("--fold {number} of --folds {of}"),
        (Some(of), Some(number)) => Ok(vec![Some(Fold { number, of })]),
        (Some(of), None) => Ok((1..=of).map(|number| Some(Fold { number, of })).collect()),
    }
}

fn split_of(titles: &[Title], fold: Option<Fold>) -> Split {
    match fold {
        None => the_split(titles),
        Some(Fold { number, of }) => data::fold(&labels(titles), of, number - 1, data::SPLIT_SEED),
    }
}

fn run_settings(options: &Settings) -> Result<()> {
    let fold = match folds(&options.train)?.as_slice() {
        [fold] => *fold,
        _ => bail!("say which fold with --fold: their sizes may differ"),
    };
    let rows = data::training_rows(fold.map(|fold| (fold.number - 1, fold.of)));
    print!("{}", settings::job_file(&options.train.config(), rows, options.servers, options.workers)?);
    Ok(())
}

fn run_bayes(options: &Bayes) -> Result<()> {
    let titles = data::load(&options.places.data)?;
    let split = the_split(&titles);
    let pick = |rows: &[usize]| rows.iter().map(|row| &titles[*row]).collect::<Vec<_>>();
    let (train, held_out) = (pick(&split.train), pick(&split.held_out));
    let started = Instant::now();
    let confusion = bayes::evaluate(&train, &held_out, LABELS.len());
    let outcome = Outcome {
        epochs: Vec::<Epoch>::new(),
        confusion,
        losses: Vec::new(),
        train_s: started.elapsed().as_secs_f64(),
        wait_s: 0.0,
        clocks: 0,
        parameters: 0,
        rank: 0,
        workers: 1,
    };
    finish(&Record::of("bayes", options.seed, None, &outcome), &options.places.out)
}

/// Stores a job's record and says how it went.
fn finish(record: &Record, out: &Path) -> Result<()> {
    let path = record.write(out).context("the result is lost")?;
    print!("{}", report::matrix(&record.confusion));
    let scores = record.scores;
    println!(
        "{} seed {}: accuracy {:.4}, macro precision {:.4}, recall {:.4}, F1 {:.4}; {:.1} s; {}",
        record.model,
        record.seed,
        scores.accuracy,
        scores.macro_precision,
        scores.macro_recall,
        scores.macro_f1,
        record.train_s,
        path.display()
    );
    Ok(())
}
