{{/* Environment of a Ray container: dict "root" $ "group" {…} "drain" seconds. What the user sets
goes before what the chart sets, and a group's before everybody's. */}}
{{- define "mell-ray.env" -}}
{{- $values := .root.Values -}}
{{- $cache := $values.modelCache.mountPath -}}
{{- $own := list
  (dict "name" "RAY_USAGE_STATS_ENABLED" "value" "0")
  (dict "name" "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" "value" (toString .drain))
  (dict "name" "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD" "value" "0")
  (dict "name" "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP" "value" "0")
  (dict "name" "RAY_SERVE_DEPLOYMENT_ACTOR_HEALTH_CHECK_PERIOD_S" "value" "1")
  (dict "name" "HF_HOME" "value" $cache)
  (dict "name" "XDG_CACHE_HOME" "value" "/tmp/cache")
  (dict "name" "TRITON_CACHE_DIR" "value" "/tmp/cache/triton") -}}
{{- if ne $values.rayAuth.mode "token" -}}
{{- $own = append $own (dict "name" "RAY_AUTH_MODE" "value" $values.rayAuth.mode) -}}
{{- end -}}
{{- if $values.serve.haproxy -}}
{{- $own = append $own (dict "name" "RAY_SERVE_ENABLE_HA_PROXY" "value" "1") -}}
{{- end -}}
{{- if $values.huggingFace.offline -}}
{{- $own = append $own (dict "name" "HF_HUB_OFFLINE" "value" "1") -}}
{{- end -}}
{{- with $values.huggingFace.tokenSecret -}}
{{- $own = append $own (dict "name" "HF_TOKEN" "valueFrom" (dict "secretKeyRef" (dict "name" .name "key" (.key | default "token")))) -}}
{{- end -}}
{{- $seen := dict -}}
{{- $env := list -}}
{{- range concat (.group.env | default list) ($values.env | default list) $own -}}
{{- if not (hasKey $seen .name) -}}
{{- $_ := set $seen .name true -}}
{{- $env = append $env . -}}
{{- end -}}
{{- end -}}
{{- toYaml $env -}}
{{- end -}}

{{- define "mell-ray.volumes" -}}
{{- $values := .root.Values -}}
{{- $cache := dict "name" "models" -}}
{{- if eq $values.modelCache.type "emptyDir" -}}
{{- $_ := set $cache "emptyDir" (dict "sizeLimit" $values.modelCache.size) -}}
{{- else -}}
{{- $_ := set $cache "persistentVolumeClaim" (dict "claimName" (include "mell-ray.modelCacheClaim" .root)) -}}
{{- end -}}
{{- $volumes := list (dict "name" "tmp" "emptyDir" dict) $cache -}}
{{- range $list, $secret := include "mell-ray.keySecrets" .root | fromYaml -}}
{{- $volumes = append $volumes (include "mell-ray.keyVolume" (list $list $secret) | fromYaml) -}}
{{- end -}}
{{- include "mell-ray.overridden" (list "name" $volumes (concat ($values.volumes | default list) (.group.volumes | default list))) -}}
{{- end -}}

{{- define "mell-ray.volumeMounts" -}}
{{- $values := .root.Values -}}
{{- $mounts := list
  (dict "name" "tmp" "mountPath" "/tmp")
  (dict "name" "models" "mountPath" $values.modelCache.mountPath) -}}
{{- range $list, $secret := include "mell-ray.keySecrets" .root | fromYaml -}}
{{- $path := printf "%s/%s" (include "mell-ray.keysPath" $.root) $list -}}
{{- $mounts = append $mounts (dict "name" (printf "keys-%s" $list) "mountPath" $path "readOnly" true) -}}
{{- end -}}
{{- include "mell-ray.overridden" (list "mountPath" $mounts (concat ($values.volumeMounts | default list) (.group.volumeMounts | default list))) -}}
{{- end -}}

{{/* The chart's entries but those that the user has one for, then the user's: list key own given.
Kubernetes refuses two volumes of a name, or two mounts at a path. */}}
{{- define "mell-ray.overridden" -}}
{{- $key := index . 0 -}}
{{- $given := dict -}}
{{- range index . 2 }}{{ $_ := set $given (index . $key) true }}{{ end -}}
{{- $kept := list -}}
{{- range index . 1 -}}
{{- if not (hasKey $given (index . $key)) }}{{ $kept = append $kept . }}{{ end -}}
{{- end -}}
{{- toYaml (concat $kept (index . 2)) -}}
{{- end -}}

{{/* The volume of a list of API keys: list name secret. Only the pod's group may read it. */}}
{{- define "mell-ray.keyVolume" -}}
name: {{ printf "keys-%s" (index . 0) }}
secret:
  secretName: {{ index . 1 }}
  defaultMode: 0440
{{- end -}}

{{/* A pod template: dict "root" $ "group" {…} "component" head|worker "ports" […] "grace" seconds
"drain" seconds */}}
{{- define "mell-ray.podTemplate" -}}
{{- $root := .root -}}
{{- $values := .root.Values -}}
{{- $group := .group -}}
{{- $image := mergeOverwrite (deepCopy $values.image) ($group.image | default dict) -}}
{{- $annotations := mergeOverwrite (deepCopy ($values.podAnnotations | default dict)) ($group.podAnnotations | default dict) -}}
{{- if $values.metrics.podAnnotations -}}
{{- $annotations = mergeOverwrite (dict "prometheus.io/scrape" "true" "prometheus.io/port" "8080" "prometheus.io/path" "/metrics") $annotations -}}
{{- end -}}
{{- $own := mergeOverwrite (include "mell-ray.selectorLabels" $root | fromYaml) (dict "app.kubernetes.io/component" .component) -}}
{{- $resources := deepCopy ($group.resources | default dict) -}}
{{- $tolerations := $group.tolerations | default list -}}
{{- $gpus := int ($group.gpusPerPod | default 0) -}}
{{- if $gpus -}}
{{- $limits := mergeOverwrite (deepCopy ($resources.limits | default dict)) (dict $group.gpuResource (toString $gpus)) -}}
{{- $resources = mergeOverwrite $resources (dict "limits" $limits) -}}
{{- $tolerations = append $tolerations (dict "key" $group.gpuResource "operator" "Exists" "effect" "NoSchedule") -}}
{{- end -}}
metadata:
  labels:
    {{- toYaml (mergeOverwrite (deepCopy ($values.podLabels | default dict)) ($group.podLabels | default dict) $own) | nindent 4 }}
  {{- with $annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- with include "mell-ray.serviceAccountName" $root }}
  serviceAccountName: {{ . }}
  {{- end }}
  automountServiceAccountToken: {{ and (eq .component "head") $values.autoscaler.enabled }}
  enableServiceLinks: false
  {{- if and $values.autoscaler.enabled (eq $values.autoscaler.version "v2") }}
  restartPolicy: Never
  {{- end }}
  terminationGracePeriodSeconds: {{ .grace }}
  {{- with $values.podSecurityContext }}
  securityContext:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $group.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $group.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.initContainers }}
  initContainers:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ printf "ray-%s" .component }}
      image: {{ include "mell-ray.image" (dict "root" $root "override" $group.image) }}
      imagePullPolicy: {{ $image.pullPolicy }}
      {{- with $values.containerSecurityContext }}
      securityContext:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        {{- range .ports }}
        - name: {{ .name }}
          containerPort: {{ .port }}
        {{- end }}
      env:
        {{- include "mell-ray.env" . | nindent 8 }}
      {{- with concat ($group.envFrom | default list) ($values.envFrom | default list) }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .preStop }}
      lifecycle:
        preStop:
          exec:
            command: ["bash", "-c", {{ printf "sleep %d" (int .) | quote }}]
      {{- end }}
      {{- with $resources }}
      resources:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts:
        {{- include "mell-ray.volumeMounts" . | nindent 8 }}
    {{- with $group.sidecars }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    {{- include "mell-ray.volumes" . | nindent 4 }}
{{- end -}}
