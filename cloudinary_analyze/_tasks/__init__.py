"""How an accepted task gets its answer.

The service responds to an asynchronous analysis with a task id. From then on there are two sources
of information, and only one of them has the result:

* **A notification**, the signed webhook, carries the result or the reason of the failure. It may
  arrive before the 202 that names the task, twice, late, or never.
* **A poll** of the task's status reports only its state. It finds failures, and completed tasks
  whose notification was lost. If it does contain a result or a reason, that is used.

`table` has one entry per task id, and the first answer wins. `listener` reads the notification
source, and `poller` polls the status of tasks. `tracker` performs the effects that the table
returns. `answers` builds answers and errors, and `quotas` records the quotas in them. If a poll
says *completed* and no notification arrives within the grace, the result is missing: the task fails
with `ResultNotDeliveredError`, or is repeated as a call if the settings ask for that. If a poll
says *failed*, the notification with the reason has a short grace. A poll that fails never fails a
task that has a source.
"""
