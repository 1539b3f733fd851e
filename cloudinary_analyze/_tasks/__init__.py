"""How an accepted task gets its answer.

The service answers an asynchronous analysis with a task id. From then on there are two sources
of news, and only one of them has the result:

* **A notification**, the signed webhook, carries the result or the reason of the failure. It may
  arrive before the 202 that names the task, twice, late, or never.
* **A poll** of the task's status reports its state, and nothing else. It finds failures,
  and completed tasks whose notification was lost. A result or a reason in it is used all the same.

`table` has one entry per task id; the first answer wins. `listener` reads the
notification source, `poller` asks for the status of what is due. `tracker` performs what the table
returns. `answers` builds what ends a task, and `quotas` passes on what that says of quotas. When a poll says *completed* and
no notification came within the grace, the result is missing: the task fails with
`ResultNotDeliveredError`, or is repeated as a call if the settings say so. When it says *failed*,
the notification with the reason gets a short grace. Polls that fail never fail a task that has a
source.
"""
