//! stub
use anyhow::Result;
use serde::Serialize;
/// o
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Options {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}
/// r
#[derive(Debug, Clone, Serialize)]
pub struct Report {}
impl Report {
    /// t
    pub fn text(&self) -> String {
        String::new()
    }
}
/// r
///
/// # Errors
/// never
pub fn run(_: Options) -> Result<Report> {
    Ok(Report {})
}
