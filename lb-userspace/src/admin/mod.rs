//! The admin API on a unix socket.

pub mod client;
pub mod route;
pub mod server;
pub mod socket;
pub mod view;

#[cfg(test)]
pub(crate) mod sample;

/// Where the answers come from; the daemon implements it.
pub trait Source: Send + Sync + 'static {
    /// `GET /v1/status`
    fn status(&self) -> view::Status;
    /// `GET /v1/flows`
    fn flows(&self) -> Vec<view::FlowView>;
    /// `GET /v1/sessions`
    fn sessions(&self) -> Vec<view::SessionView>;
    /// `GET /v1/stats`
    fn stats(&self) -> view::Stats;
    /// `GET /v1/policies`
    fn policies(&self) -> Vec<view::PolicyView>;
    /// `GET /v1/explain`
    ///
    /// # Errors
    ///
    /// In words for the user.
    fn explain(&self, question: &view::Question) -> Result<view::ExplanationView, String>;
}
