//! Children that do not outlive who started them.

use std::process::Command;

/// Makes the command's process end when the thread that starts it does, however that ends.
///
/// The kernel counts the thread, not the process: start from one that lives as long as the child is to.
#[expect(unsafe_code, reason = "what happens between fork and exec can be said in no other way")]
pub fn die_with_parent(command: &mut Command) -> &mut Command {
    use std::os::unix::process::CommandExt;
    // SAFETY: the closure runs in the child after `fork`, where only async-signal-safe calls are allowed. It makes
    // one system call (`prctl`), allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            Ok(())
        })
    }
}
