{{/* What a JSON schema cannot say and what would otherwise fail after the installation: KubeRay
rejects some of it in an event nobody reads, and the rest leaves pods pending for ever. */}}
{{- define "mell-ray.validate" -}}
{{- $values := .Values -}}
{{- $v2 := and $values.autoscaler.enabled (eq $values.autoscaler.version "v2") -}}
{{- $groups := include "mell-ray.groups" . | fromYaml -}}
{{- $gpus := 0 -}}
{{- $offers := dict -}}
{{- range $name, $quantity := $values.head.rayResources }}{{ $_ := set $offers $name true }}{{ end -}}
{{- range $name, $group := $groups -}}
  {{- $where := printf "workerGroups.%s" $name -}}
  {{- if gt (int $group.minReplicas) (int $group.maxReplicas) -}}
    {{- fail (printf "%s: minReplicas (%d) exceeds maxReplicas (%d)" $where (int $group.minReplicas) (int $group.maxReplicas)) -}}
  {{- end -}}
  {{- if hasKey $group "replicas" -}}
    {{- if or (lt (int $group.replicas) (int $group.minReplicas)) (gt (int $group.replicas) (int $group.maxReplicas)) -}}
      {{- fail (printf "%s: replicas (%d) is not between minReplicas (%d) and maxReplicas (%d)" $where (int $group.replicas) (int $group.minReplicas) (int $group.maxReplicas)) -}}
    {{- end -}}
  {{- end -}}
  {{- if and (hasKey $group "idleTimeoutSeconds") (not $v2) -}}
    {{- fail (printf "%s.idleTimeoutSeconds: needs autoscaler.enabled and autoscaler.version v2" $where) -}}
  {{- end -}}
  {{- if and $group.priority (not $v2) -}}
    {{- fail (printf "%s.priority: needs autoscaler.enabled and autoscaler.version v2" $where) -}}
  {{- end -}}
  {{- if and $group.acceleratorType (not (int $group.gpusPerPod)) -}}
    {{- fail (printf "%s.acceleratorType: the group has no GPU; set gpusPerPod" $where) -}}
  {{- end -}}
  {{- if int $group.gpusPerPod -}}
    {{- if hasKey ((($group.resources | default dict).limits) | default dict) $group.gpuResource -}}
      {{- fail (printf "%s.resources.limits: %s comes from gpusPerPod; remove it" $where $group.gpuResource) -}}
    {{- end -}}
    {{- $gpus = add $gpus (mul (int $group.gpusPerPod) (int $group.maxReplicas)) -}}
    {{- $_ := set $offers "GPU" true -}}
  {{- end -}}
  {{- range $resource, $quantity := include "mell-ray.rayResources" $group | fromYaml -}}
    {{- $_ := set $offers $resource true -}}
  {{- end -}}
{{- end -}}
{{- with $values.serve.mell.control_resource -}}
  {{- if not (hasKey $offers .) -}}
    {{- fail (printf "serve.mell.control_resource: no pod offers %q; name it in head.rayResources or a group's rayResources" .) -}}
  {{- end -}}
{{- end -}}
{{- $fleet := $values.serve.mell.fleet | default dict -}}
{{- $cpuResource := $fleet.cpu_resource | default "mell_cpu" -}}
{{- $wanted := 0 -}}
{{- $ids := dict -}}
{{- range $i, $model := $values.serve.models -}}
  {{- $where := printf "serve.models[%d]" $i -}}
  {{- $id := $model.model_loading_config.model_id -}}
  {{- if hasKey $ids $id }}{{ fail (printf "%s: model_id %q stands in serve.models twice" $where $id) }}{{ end -}}
  {{- $_ := set $ids $id true -}}
  {{- $kind := $model.accelerator_type -}}
  {{- $scaling := ($model.deployment_config | default dict).autoscaling_config | default dict -}}
  {{- $min := int (hasKey $scaling "min_replicas" | ternary $scaling.min_replicas 1) -}}
  {{- $max := int ($scaling.max_replicas | default 1) -}}
  {{- if gt $min $max -}}
    {{- fail (printf "%s.deployment_config.autoscaling_config: min_replicas (%d) exceeds max_replicas (%d)" $where $min $max) -}}
  {{- end -}}
  {{- if not $kind -}}
    {{- fail (printf "%s.accelerator_type: say GPU, CPU or a type such as H100; without it the model would run on the head's CPU while there is no GPU pod yet" $where) -}}
  {{- else if eq $kind "CPU" -}}
    {{- if and $fleet.require_cpu_resource (not (hasKey $offers $cpuResource)) -}}
      {{- fail (printf "serve.mell.fleet.require_cpu_resource: no pod offers %q; name it in a group's rayResources" $cpuResource) -}}
    {{- end -}}
  {{- else -}}
    {{- $wanted = add $wanted $min -}}
    {{- $needs := eq $kind "GPU" | ternary "GPU" (printf "accelerator_type:%s" $kind) -}}
    {{- if not (hasKey $offers $needs) -}}
      {{- fail (printf "%s.accelerator_type: no worker group has a %s; set gpusPerPod (and acceleratorType) of one" $where $kind) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- if gt (int $wanted) (int $gpus) -}}
  {{- fail (printf "serve.models: their min_replicas need %d GPUs, the worker groups have at most %d" (int $wanted) (int $gpus)) -}}
{{- end -}}
{{- $drain := include "mell-ray.ingressDrain" . | int -}}
{{- if le (int $values.head.terminationGracePeriodSeconds) (int (add $values.head.preStopSeconds $drain)) -}}
  {{- fail (printf "head.terminationGracePeriodSeconds (%d) must exceed head.preStopSeconds (%d) plus serve.mell.ingress.drain_s (%d)" (int $values.head.terminationGracePeriodSeconds) (int $values.head.preStopSeconds) $drain) -}}
{{- end -}}
{{- if eq $values.upgrade.type "NewClusterWithIncrementalUpgrade" -}}
  {{- if not $values.autoscaler.enabled }}{{ fail "upgrade.type NewClusterWithIncrementalUpgrade: needs autoscaler.enabled" }}{{ end -}}
  {{- if not $values.upgrade.gatewayClassName }}{{ fail "upgrade.gatewayClassName: is required by NewClusterWithIncrementalUpgrade" }}{{ end -}}
  {{- if gt (int $values.upgrade.stepSizePercent) (int $values.upgrade.maxSurgePercent) -}}
    {{- fail (printf "upgrade.stepSizePercent (%d) exceeds maxSurgePercent (%d)" (int $values.upgrade.stepSizePercent) (int $values.upgrade.maxSurgePercent)) -}}
  {{- end -}}
  {{- if or $values.ingress.enabled $values.httpRoute.enabled -}}
    {{- fail "ingress.enabled, httpRoute.enabled: with NewClusterWithIncrementalUpgrade KubeRay makes its own Gateway and routes; turn them off" -}}
  {{- end -}}
{{- end -}}
{{- if and $values.gcsFaultTolerance.enabled (not $values.gcsFaultTolerance.redisAddress) -}}
  {{- fail "gcsFaultTolerance.redisAddress: is required" -}}
{{- end -}}
{{- if and (eq $values.modelCache.type "existingClaim") (not $values.modelCache.existingClaim) -}}
  {{- fail "modelCache.existingClaim: name the claim" -}}
{{- end -}}
{{- if and $values.ingress.enabled (not $values.ingress.hosts) }}{{ fail "ingress.hosts: name at least one" }}{{ end -}}
{{- if and $values.httpRoute.enabled (not $values.httpRoute.parentRefs) }}{{ fail "httpRoute.parentRefs: name a Gateway" }}{{ end -}}
{{- if and (not $values.serviceAccount.create) (not $values.serviceAccount.name) $values.serviceAccount.annotations -}}
  {{- fail "serviceAccount.annotations: there is no ServiceAccount to annotate; set create" -}}
{{- end -}}
{{- end -}}
